r"""Long convolution of sequences whose length is spread over the devices of a mesh axis.

Device p of P holds steps p n to p n + n - 1 of L = P n. A device can compute an exact result from one exchange of no
more numbers than it holds only where there are several rows to hand out: any n different frequencies of a block of n
steps are n independent numbers, so a set of L / P frequencies of one row needs all of that row. Hence two ways.

Features. One all-to-all gives each device every step of D / P features, and one brings the results back.

Frequencies. The outer stage of the butterfly is an all-to-all itself: see `distributed_frequencies`.
"""

from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.arguments import floating, shaped
from flashbutterfly_jax.functional.distributed_frequencies import long_conv_by_frequencies
from flashbutterfly_jax.functional.long_conv import _resolve, long_conv
from flashbutterfly_jax.functional.taps import circular_taps
from flashbutterfly_jax.typing import ArrayLike, Implementations, checked_by_hand

type Split = Literal["features", "frequencies"]
"""What a device has all of, between the exchanges: every step of some features, or some frequencies of every one."""

_SPLITS: tuple[Split, ...] = get_args(Split.__value__)


@checked_by_hand
def sequence_parallel_long_conv(
    u: Annotated[ArrayLike, "*B D n"],
    kernel: Annotated[ArrayLike, "*C D k"],
    skip: Annotated[ArrayLike, "*C D"] | None = None,
    *,
    axis_name: str,
    reverse_kernel: Annotated[ArrayLike, "*C D k"] | None = None,
    circular: bool = False,
    pre_gate: Annotated[ArrayLike, "*B D n"] | None = None,
    post_gate: Annotated[ArrayLike, "*BC D n"] | None = None,
    split: Split | None = None,
    implementation: Implementations = "xla",
) -> Float[Array, "*BC D n"]:
    r"""`long_conv` inside `jax.shard_map`, on the part of the sequence that this device holds.

    Of a sequence of L steps on P devices the p-th holds the p-th n = L / P, and likewise the p-th k = K / P taps of
    each kernel, K <= L. The result and every gradient are spread like what they belong to; other axes of the mesh may
    spread the batch. `long_conv_on_mesh` takes whole arrays instead, and any number of taps.

    The result has the dtype of u, each gradient that of its argument. By frequencies computes in float32, and in
    float64 where any argument is; by features as ``implementation`` does. Without gates numbers of 16 bits travel as
    such; spectra, kernels and what is gated do not.

    **What travels.** Real numbers that the exchanges carry, for each number that a device holds of u, y or the kernel,
    y being C times u; 1 / P of them stays where it is:

    ========================  ============  ===================  ====================================
    ``split``                 all-to-alls   circular             causal
    ========================  ============  ===================  ====================================
    ``"features"``            1             1                    1
    ``"frequencies"``         2             2 + 2 P / n at most  3 + 2 P / n at most, fewer if K < L
    ========================  ============  ===================  ====================================

    Of a kernel with K < L the first exchange carries its own K numbers, the second as many as for u. A reverse kernel
    has a first exchange of its own; its spectrum is part of the kernel's. Reverse mode
    carries the same again, the other way: 3 and 3 all-to-alls for u, the kernel and y by features, 6 and 6 by
    frequencies. Nothing is gathered. If the batch is spread too, the kernel's gradient is summed over it as a spectrum,
    one all-reduce of 1 number for each tap, or 2 if causal, and a skip has one of C D numbers over the axis.
    Reverse mode keeps the spectra of u and of the kernel, unless `jax.checkpoint` says otherwise.

    **How it scales.** For B D rows in float32 and one kernel channel, u and y together cost a device
    8 B D L / P \* (1 - 1 / P) bytes by features, in 2 (P - 1) messages of 4 B D L / P^2. With B D = 8 * 768 and
    L = 2^20, and the kernel's 4 D L / P * (1 - 1 / P) bytes besides:

    ====  ====================================  ===================  ==========================
    P     link, each direction                  by features          by frequencies, causal
    ====  ====================================  ===================  ==========================
    8     NVLink, 450 GB/s                      6.0 GB, 13.3 ms      18.0 GB, 39.9 ms
    64    50 GB/s to the 56 on other nodes      0.75 GB, 15.0 ms     2.25 GB, 44.9 ms
    ====  ====================================  ===================  ==========================

    (for 64, bytes between nodes; what goes by NVLink at the same time takes a seventieth of that). These are computed
    from the rates, not measured. Computation, memory and bytes all fall as 1 / P, but the link between nodes is 9 times
    slower: eight nodes exchange in no less time than one, and only computation and memory gain from them. Past that the
    exchange falls as 1 / P again, until latency counts, for messages shrink as 1 / P^2: with 64 devices they are below
    1 MiB for fewer than 175,000 steps in this example, with 8 for fewer than 2,700. Several sequences are better spread
    over nodes by their batch, of which only the kernel's gradient has to be exchanged.

    Args:
      u: the local ``(*B, D, n)`` of a sequence ``(*B, D, L)``.
      kernel: the local ``(D, k)`` or ``(C, D, k)``, k <= n.
      skip: the weight of u itself, ``(D,)``, or ``(C, D)`` where the kernel has channels; the same on every device.
      axis_name: the mesh axis over which the length is spread.
      reverse_kernel: the kernel that looks ahead, of the kernel's shape and spread likewise.
      circular: wraps every lag modulo L.
      pre_gate: the local ``(*B, D, n)``, multiplies u before.
      post_gate: the local ``(*B, D, n)``, shared by the channels, or ``(*B, C, D, n)``; multiplies the result.
      split: ``"features"``, where P divides D, or ``"frequencies"``, where P divides n and k, which any number of
        features may have. None is features where P divides D and frequencies elsewhere.
      implementation: of the convolution that a device computes by features, as for `long_conv`; None is the fastest.
        By frequencies there is but ``"xla"``.

    Returns:
      The local ``(*B, D, n)``, or ``(*B, C, D, n)`` where the kernel has channels.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value, there is no such axis, or P does not divide.
      NotImplementedError: if no implementation named supports the request.

    Example:
      >>> import functools
      >>> import jax
      >>> from jax.sharding import PartitionSpec
      >>> from flashbutterfly_jax import long_conv, sequence_parallel_long_conv
      >>> u = jax.random.normal(jax.random.key(0), (2, 3, 256))
      >>> kernel = jax.random.normal(jax.random.key(1), (3, 256))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> by_step = PartitionSpec(None, None, "sequence")
      >>> convolve = jax.shard_map(
      ...     functools.partial(sequence_parallel_long_conv, axis_name="sequence"),
      ...     mesh=mesh,
      ...     in_specs=(by_step, PartitionSpec(None, "sequence")),
      ...     out_specs=by_step,
      ... )
      >>> y = jax.jit(convolve)(u, kernel)
      >>> bool(abs(y - long_conv(u, kernel)).max() < 1e-4)
      True
    """
    devices = _axis_size(axis_name)
    u, kernel = floating("u", u), floating("kernel", kernel)
    if not isinstance(circular, bool):
        raise ValueError(f"circular must be True or False; got {circular!r}.")
    if u.ndim < 2 or not u.size:
        raise ValueError(f"u must have shape (*B, D, n) and no empty axis; got shape {u.shape}.")
    *batch, features, steps = u.shape
    if kernel.ndim not in (2, 3) or kernel.shape[-2] != features or not kernel.size or kernel.shape[-1] > steps:
        raise ValueError(
            f"kernel must have shape (D, k) or (C, D, k) with 1 <= k <= n, D = {features} and n = {steps} as in u of "
            f"shape {u.shape}; got shape {kernel.shape}."
        )
    channels = kernel.shape[:-2]
    skip = shaped("skip", skip, kernel.shape[:-1], of="kernel without its taps")
    reverse_kernel = shaped("reverse_kernel", reverse_kernel, kernel.shape, of="kernel")
    pre_gate = shaped("pre_gate", pre_gate, u.shape, of="u")
    post_gate = shaped("post_gate", post_gate, u.shape, (*batch, *channels, features, steps), of="u or of the result")
    split = _resolve_split(split, devices, features, implementation)
    if split == "frequencies":
        _must_divide("a length of L", steps * devices, devices, axis_name)
        _must_divide("a kernel of K", kernel.shape[-1] * devices, devices, axis_name)

    # The kernel, and hence the spectra, are of the dtype that is computed in; u may travel in a narrower one.
    arguments = (u, kernel, skip, reverse_kernel, pre_gate, post_gate)
    wide = any(x is not None and x.dtype == jnp.float64 for x in arguments)
    dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    output_dtype = u.dtype
    kernel = kernel.astype(dtype).reshape(-1, *kernel.shape[-2:])
    if reverse_kernel is not None:
        reverse_kernel = reverse_kernel.astype(dtype).reshape(kernel.shape)
    if pre_gate is not None:
        u = u.astype(dtype) * pre_gate.astype(dtype)
    if skip is not None:  # lag 0 is the first tap of the first device
        tap = jnp.where(jax.lax.axis_index(axis_name) == 0, skip.astype(dtype), 0).reshape(kernel.shape[:-1])
        kernel = kernel.at[..., 0].add(tap)
    travels_as = output_dtype if post_gate is None else dtype
    if split == "features":
        y = _by_features(u, kernel, reverse_kernel, axis_name, circular, travels_as, implementation)
    else:
        y = long_conv_by_frequencies(u, kernel, reverse_kernel, axis_name, circular, travels_as)
    if post_gate is not None:
        y = y * (post_gate if post_gate.ndim > u.ndim else post_gate[..., None, :, :]).astype(dtype)
    return y.astype(output_dtype).reshape(*batch, *channels, features, steps)


@checked_by_hand
def long_conv_on_mesh(
    u: Annotated[ArrayLike, "*B D L"],
    kernel: Annotated[ArrayLike, "*C D K"],
    skip: Annotated[ArrayLike, "*C D"] | None = None,
    *,
    mesh: Mesh,
    axis_name: str,
    batch_axis_name: str | None = None,
    reverse_kernel: Annotated[ArrayLike, "*C D K"] | None = None,
    circular: bool = False,
    pre_gate: Annotated[ArrayLike, "*B D L"] | None = None,
    post_gate: Annotated[ArrayLike, "*BC D L"] | None = None,
    split: Split | None = None,
    implementation: Implementations = "xla",
) -> Float[Array, "*BC D L"]:
    """`long_conv` with the length spread over one axis of a mesh: `sequence_parallel_long_conv` of whole arrays.

    Any number of taps: those past the length are dropped, or folded if circular, and zeros fill them up to a multiple
    of P, or of P^2 for frequencies. Where that changes the number of taps they are dealt out anew, which travels too.

    Args:
      u: ``(*B, D, L)``; P divides L, and for frequencies P^2 does.
      kernel: ``(D, K)`` or ``(C, D, K)``, any K >= 1.
      skip: as for `long_conv`.
      mesh: a mesh of devices; its axes may be automatic or explicit.
      axis_name: its axis over which the length is spread.
      batch_axis_name: its axis over which the first axis of u is spread, if any.
      reverse_kernel: as for `long_conv`.
      circular: as for `long_conv`.
      pre_gate: as for `long_conv`.
      post_gate: as for `long_conv`.
      split: as for `sequence_parallel_long_conv`.
      implementation: as for `sequence_parallel_long_conv`.

    Returns:
      ``(*B, D, L)`` or ``(*B, C, D, L)``, spread like u.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value, there is no such axis, or P does not divide.
      NotImplementedError: if no implementation named supports the request.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",))
      >>> u = jnp.ones((3, 64))
      >>> y = long_conv_on_mesh(u, jnp.array([[2.0, 1.0]] * 3), mesh=mesh, axis_name="sequence")
      >>> jax.device_get(y)[0, :4].round(4).tolist()
      [2.0, 3.0, 3.0, 3.0]
    """
    for name, axis in (("axis_name", axis_name), ("batch_axis_name", batch_axis_name)):
        if axis not in mesh.axis_names and (axis is not None or name == "axis_name"):
            raise ValueError(f"{name} must be an axis of the mesh, of {mesh.axis_names}; got {axis!r}.")
    if batch_axis_name == axis_name:
        raise ValueError(f"batch_axis_name must be another axis than axis_name; got {axis_name!r} for both.")
    if not isinstance(circular, bool):
        raise ValueError(f"circular must be True or False; got {circular!r}.")
    u, kernel = floating("u", u), floating("kernel", kernel)
    if u.ndim < 2 or not u.size:
        raise ValueError(f"u must have shape (*B, D, L) and no empty axis; got shape {u.shape}.")
    if batch_axis_name is not None:
        if u.ndim < 3:
            raise ValueError(f"batch_axis_name must be None where u has no batch; got u of shape {u.shape}.")
        _must_divide("a batch of B", u.shape[0], mesh.shape[batch_axis_name], batch_axis_name, square=False)
    *batch, features, length = u.shape
    if kernel.ndim not in (2, 3) or kernel.shape[-2] != features or not kernel.size:
        raise ValueError(
            f"kernel must have shape (D, K) or (C, D, K) with K >= 1 and D = {features} as in u of shape {u.shape}; "
            f"got shape {kernel.shape}."
        )
    devices = mesh.shape[axis_name]
    split = _resolve_split(split, devices, features, implementation)
    _must_divide("a length of L", length, devices, axis_name, square=split == "frequencies")
    skip = shaped("skip", skip, kernel.shape[:-1], of="kernel without its taps")
    reverse_kernel = shaped("reverse_kernel", reverse_kernel, kernel.shape, of="kernel")
    pre_gate = shaped("pre_gate", pre_gate, u.shape, of="u")
    post_gate = shaped(
        "post_gate", post_gate, u.shape, (*batch, *kernel.shape[:-2], features, length), of="u or of the result"
    )
    kernel, reverse_kernel = _taps_to_share(
        kernel, reverse_kernel, length, devices**2 if split == "frequencies" else devices, mesh, circular
    )

    def spec(rank: int, *, of_batch: bool) -> PartitionSpec:
        return PartitionSpec(*[batch_axis_name] * of_batch, *[None] * (rank - 1 - of_batch), axis_name)

    arrays = {"u": u, "kernel": kernel}
    specs = {"u": spec(u.ndim, of_batch=u.ndim > 2), "kernel": spec(kernel.ndim, of_batch=False)}
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None:
            arrays[name], specs[name] = gate, spec(gate.ndim, of_batch=u.ndim > 2)
    if reverse_kernel is not None:
        arrays["reverse_kernel"], specs["reverse_kernel"] = reverse_kernel, specs["kernel"]
    if skip is not None:
        arrays["skip"], specs["skip"] = skip, PartitionSpec()
    if AxisType.Explicit in mesh.axis_types:  # there arrays have to be placed by hand, elsewhere XLA does it
        arrays = {name: _placed(x, mesh, specs[name]) for name, x in arrays.items()}

    def local(arrays: dict[str, Array]) -> Array:
        return sequence_parallel_long_conv(
            arrays["u"],
            arrays["kernel"],
            arrays.get("skip"),
            axis_name=axis_name,
            reverse_kernel=arrays.get("reverse_kernel"),
            circular=circular,
            pre_gate=arrays.get("pre_gate"),
            post_gate=arrays.get("post_gate"),
            split=split,
            implementation=implementation,
        )

    out_spec = spec(u.ndim + kernel.ndim - 2, of_batch=u.ndim > 2)
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out_spec)(arrays)


def _taps_to_share(
    kernel: Float[Array, "*C D K"],
    reverse_kernel: Float[Array, "*C D K"] | None,
    length: int,
    unit: int,
    mesh: Mesh,
    circular: bool,
) -> tuple[Float[Array, "*C D _"], Float[Array, "*C D _"] | None]:
    """At most so many taps, and a multiple of the unit: the rest dropped, or folded if circular, and filled up."""
    *rows, taps = kernel.shape
    missing = -min(taps, length) % unit
    kernels = [kernel] if reverse_kernel is None else [kernel, reverse_kernel]
    if missing or taps > length:
        kernels = [_placed(x, mesh, PartitionSpec()) if jax.typeof(x).sharding.spec[-1] else x for x in kernels]
    if taps > length and circular:
        flat = [x.reshape(-1, *x.shape[-2:]) for x in kernels]
        kernels = [circular_taps(flat[0], flat[1] if len(flat) == 2 else None, length)]
    kernels = [x[..., :length].reshape(*rows, -1) for x in kernels]
    if missing:
        kernels = [jnp.pad(x, ((0, 0),) * len(rows) + ((0, missing),)) for x in kernels]
    return kernels[0], kernels[1] if len(kernels) == 2 else None


def _by_features(
    u: Float[Array, "*B D n"],
    kernel: Float[Array, "C D k"],
    reverse_kernel: Float[Array, "C D k"] | None,
    axis_name: str,
    circular: bool,
    output_dtype: jnp.dtype,
    implementation: Implementations,
) -> Float[Array, "*B C D n"]:
    """Every step of a P-th of the features on each device."""

    def whole_sequences(x):
        return jax.lax.all_to_all(x, axis_name, split_axis=x.ndim - 2, concat_axis=x.ndim - 1, tiled=True)

    u = whole_sequences(u)  # narrower than the result where there is a gate after it alone
    y = long_conv(
        u.astype(jnp.promote_types(u.dtype, output_dtype)),
        whole_sequences(kernel),
        reverse_kernel=None if reverse_kernel is None else whole_sequences(reverse_kernel),
        circular=circular,
        implementation=implementation,
    ).astype(output_dtype)
    return jax.lax.all_to_all(y, axis_name, split_axis=y.ndim - 1, concat_axis=y.ndim - 2, tiled=True)


def _axis_size(axis_name: str) -> int:
    try:
        return jax.lax.axis_size(axis_name)
    except (NameError, TypeError):
        names = jax.sharding.get_abstract_mesh().manual_axes
        among = f"of {names}" if names else "of which there are none: call this inside jax.shard_map"
        raise ValueError(f"axis_name must be a manual axis of the mesh, {among}; got {axis_name!r}.") from None


def _resolve_split(split: Any, devices: int, features: int, implementation: Implementations) -> Split:
    if split is None:
        split = "frequencies" if features % devices else "features"
    elif split not in _SPLITS:
        raise ValueError(f"split must be None or of {_SPLITS}; got {split!r}.")
    elif split == "features" and features % devices:
        raise ValueError(f"split must be 'frequencies' where P = {devices} does not divide D = {features}.")
    if split == "frequencies" and implementation is not None and "xla" not in _resolve(implementation):
        raise NotImplementedError(
            f"split 'frequencies' is computed by 'xla' alone; got implementation {implementation!r}. Split 'features', "
            f"which takes others, needs D = {features} to be a multiple of P = {devices}."
        )
    return split


def _must_divide(what: str, length: int, devices: int, axis_name: str, *, square: bool = True) -> None:
    """Raises where P, or its square, does not divide the length."""
    unit = devices**2 if square else devices
    if length % unit:
        below = length - length % unit
        nearest = f"{below} and {below + unit} are" if below else f"{unit} is"
        divisor = f"P^2 = {unit}, P = {devices}" if square else f"P = {devices}"
        raise ValueError(
            f"{what} = {length} cannot be split over axis {axis_name!r}, since {divisor}, does not divide it; "
            f"the nearest that can: {nearest}."
        )


def _placed(x: Array, mesh: Mesh, spec: PartitionSpec) -> Array:
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))
