r"""Long convolution of sequences whose length is spread over the devices of a mesh axis.

Device p of P holds steps p n to p n + n - 1 of L = P n. A device can compute an exact result from one exchange of no
more numbers than it holds only where there are several rows to hand out: any n different frequencies of a block of n
steps are n independent numbers, so a set of L / P frequencies of one row needs all of that row. Hence two ways.

Features. One all-to-all gives each device every step of D / P features, and one brings the results back.

Frequencies. The outer stage of the butterfly is an all-to-all itself. Let step t = p + P j. Device p gets the steps of
its p, which is one exchange of real numbers, and transforms them over j: m points, m = n, or up to 2n with zeros behind
that never leave the device, where the convolution must not wrap. With N = P m and frequency k = k2 + m k1,

.. math:: X_k = \sum_p w_P^{k_1 p}\, w_N^{k_2 p} \sum_{j < m} w_m^{k_2 j}\, x_{p + P j}, \qquad w_N = e^{-2 \pi i / N}.

The inner sum is a real FFT, of which the columns k2 = 0 to m / 2 carry everything, for all k1: the other half of the
columns is their mirror image. A second exchange deals the columns out, after which P-point transforms over p are local,
and so is the product with the kernel's spectrum, which has come the same way. Nothing is put in order: the inverse goes
the way back, last stage first.
"""

import math
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Complex, Float, Inexact

from flashbutterfly_jax.functional.arguments import floating, shaped
from flashbutterfly_jax.functional.long_conv import long_conv
from flashbutterfly_jax.functional.spectral import irfft, rfft
from flashbutterfly_jax.functional.taps import circular_taps
from flashbutterfly_jax.functional.xla import next_fast_even
from flashbutterfly_jax.typing import ArrayLike, checked_by_hand

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
    circular: bool = False,
    pre_gate: Annotated[ArrayLike, "*B D n"] | None = None,
    post_gate: Annotated[ArrayLike, "*BC D n"] | None = None,
    split: Split | None = None,
) -> Float[Array, "*BC D n"]:
    r"""`long_conv` inside `jax.shard_map`, on the part of the sequence that this device holds.

    Of a sequence of L steps on P devices the p-th holds the p-th n = L / P, and likewise the p-th k = K / P taps of
    each kernel, K <= L. The result and every gradient are spread like what they belong to; other axes of the mesh may
    spread the batch. `long_conv_on_mesh` takes whole arrays instead, and any number of taps.

    The result has the dtype of u, each gradient that of its argument. Computes in float32, and in float64 where any
    argument is. Without gates numbers of 16 bits travel as such; spectra, kernels and what is gated do not.

    **What travels.** Real numbers that the exchanges carry, for each number that a device holds of u, y or the kernel,
    y being C times u; 1 / P of them stays where it is:

    ========================  ============  ===================  ====================================
    ``split``                 all-to-alls   circular             causal
    ========================  ============  ===================  ====================================
    ``"features"``            1             1                    1
    ``"frequencies"``         2             2 + 2 P / n at most  3 + 2 P / n at most, fewer if K < L
    ========================  ============  ===================  ====================================

    Of a kernel with K < L the first exchange carries its own K numbers, the second as many as for u. Reverse mode
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
      circular: wraps every lag modulo L.
      pre_gate: the local ``(*B, D, n)``, multiplies u before.
      post_gate: the local ``(*B, D, n)``, shared by the channels, or ``(*B, C, D, n)``; multiplies the result.
      split: ``"features"``, where P divides D, or ``"frequencies"``, where P divides n and k, which any number of
        features may have. None is features where P divides D and frequencies elsewhere.

    Returns:
      The local ``(*B, D, n)``, or ``(*B, C, D, n)`` where the kernel has channels.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value, there is no such axis, or P does not divide.

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
    pre_gate = shaped("pre_gate", pre_gate, u.shape, of="u")
    post_gate = shaped("post_gate", post_gate, u.shape, (*batch, *channels, features, steps), of="u or of the result")
    split = _resolve_split(split, devices, features)
    if split == "frequencies":
        _must_divide("a length of L", steps * devices, devices, axis_name)
        _must_divide("a kernel of K", kernel.shape[-1] * devices, devices, axis_name)

    # The kernel, and hence the spectra, are of the dtype that is computed in; u may travel in a narrower one.
    arguments = (u, kernel, skip, pre_gate, post_gate)
    wide = any(x is not None and x.dtype == jnp.float64 for x in arguments)
    dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    output_dtype = u.dtype
    kernel = kernel.astype(dtype).reshape(-1, *kernel.shape[-2:])
    if pre_gate is not None:
        u = u.astype(dtype) * pre_gate.astype(dtype)
    if skip is not None:  # lag 0 is the first tap of the first device
        tap = jnp.where(jax.lax.axis_index(axis_name) == 0, skip.astype(dtype), 0).reshape(kernel.shape[:-1])
        kernel = kernel.at[..., 0].add(tap)
    convolve = _by_features if split == "features" else _by_frequencies
    y = convolve(u, kernel, axis_name, circular, output_dtype if post_gate is None else dtype)
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
    circular: bool = False,
    pre_gate: Annotated[ArrayLike, "*B D L"] | None = None,
    post_gate: Annotated[ArrayLike, "*BC D L"] | None = None,
    split: Split | None = None,
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
      circular: as for `long_conv`.
      pre_gate: as for `long_conv`.
      post_gate: as for `long_conv`.
      split: as for `sequence_parallel_long_conv`.

    Returns:
      ``(*B, D, L)`` or ``(*B, C, D, L)``, spread like u.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value, there is no such axis, or P does not divide.

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
    if batch_axis_name is not None and (u.ndim < 3 or u.shape[0] % mesh.shape[batch_axis_name]):
        raise ValueError(
            f"batch_axis_name must be None where the {mesh.shape[batch_axis_name]} devices of {batch_axis_name!r} do "
            f"not divide the first axis of u's batch; got u of shape {u.shape}."
        )
    *batch, features, length = u.shape
    if kernel.ndim not in (2, 3) or kernel.shape[-2] != features or not kernel.size:
        raise ValueError(
            f"kernel must have shape (D, K) or (C, D, K) with K >= 1 and D = {features} as in u of shape {u.shape}; "
            f"got shape {kernel.shape}."
        )
    devices = mesh.shape[axis_name]
    split = _resolve_split(split, devices, features)
    _must_divide("a length of L", length, devices, axis_name, square=split == "frequencies")
    skip = shaped("skip", skip, kernel.shape[:-1], of="kernel without its taps")
    pre_gate = shaped("pre_gate", pre_gate, u.shape, of="u")
    post_gate = shaped(
        "post_gate", post_gate, u.shape, (*batch, *kernel.shape[:-2], features, length), of="u or of the result"
    )
    missing = -min(kernel.shape[-1], length) % (devices**2 if split == "frequencies" else devices)
    if (missing or kernel.shape[-1] > length) and jax.typeof(kernel).sharding.spec[-1] is not None:
        kernel = _placed(kernel, mesh, PartitionSpec())
    if kernel.shape[-1] > length:
        folded = circular_taps(kernel.reshape(-1, *kernel.shape[-2:]), None, length) if circular else kernel
        kernel = folded[..., :length].reshape(*kernel.shape[:-1], length)
    if missing:
        kernel = jnp.pad(kernel, ((0, 0),) * (kernel.ndim - 1) + ((0, missing),))

    def spec(rank: int, *, of_batch: bool) -> PartitionSpec:
        return PartitionSpec(*[batch_axis_name] * of_batch, *[None] * (rank - 1 - of_batch), axis_name)

    arrays = {"u": u, "kernel": kernel}
    specs = {"u": spec(u.ndim, of_batch=u.ndim > 2), "kernel": spec(kernel.ndim, of_batch=False)}
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None:
            arrays[name], specs[name] = gate, spec(gate.ndim, of_batch=u.ndim > 2)
    if skip is not None:
        arrays["skip"], specs["skip"] = skip, PartitionSpec()
    if AxisType.Explicit in mesh.axis_types:  # there arrays have to be placed by hand, elsewhere XLA does it
        arrays = {name: _placed(x, mesh, specs[name]) for name, x in arrays.items()}

    def local(arrays: dict[str, Array]) -> Array:
        return sequence_parallel_long_conv(**arrays, axis_name=axis_name, circular=circular, split=split)

    out_spec = spec(u.ndim + kernel.ndim - 2, of_batch=u.ndim > 2)
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out_spec)(arrays)


def _by_features(
    u: Float[Array, "*B D n"],
    kernel: Float[Array, "C D k"],
    axis_name: str,
    circular: bool,
    output_dtype: jnp.dtype,
) -> Float[Array, "*B C D n"]:
    """Every step of a P-th of the features on each device."""

    def whole_sequences(x):
        return jax.lax.all_to_all(x, axis_name, split_axis=x.ndim - 2, concat_axis=x.ndim - 1, tiled=True)

    # By "xla" alone, which computes in the kernel's dtype on every device.
    y = long_conv(
        whole_sequences(u).astype(kernel.dtype), whole_sequences(kernel), circular=circular, implementation="xla"
    ).astype(output_dtype)
    return jax.lax.all_to_all(y, axis_name, split_axis=y.ndim - 1, concat_axis=y.ndim - 2, tiled=True)


def _by_frequencies(
    u: Float[Array, "*B D n"],
    kernel: Float[Array, "C D k"],
    axis_name: str,
    circular: bool,
    output_dtype: jnp.dtype,
) -> Float[Array, "*B C D n"]:
    """A P-th of the columns of frequencies of every feature on each device."""
    steps, taps = u.shape[-1], kernel.shape[-1]
    points = steps if circular else min(next_fast_even(steps + taps), 2 * steps)
    strided = [_stride(x, axis_name).astype(kernel.dtype) for x in (u, kernel)]
    # In one go, since two FFTs that are free to start at once can hang on a CPU.
    spectrum, kernel_spectrum = (_outer_stage(x, points, axis_name) for x in rfft(*strided, n=points))
    product = spectrum[..., None, :, :, :] * kernel_spectrum
    (y,) = irfft(_inverse_outer_stage(product, points, axis_name), n=points)
    return _unstride(y[..., :steps].astype(output_dtype), axis_name)


def _stride(x: Float[Array, "*rows n"], axis_name: str) -> Float[Array, "*rows n"]:
    """Steps p + P j on device p, from those of its block: step q n + i P + p is number q n / P + i of device p."""
    devices = jax.lax.axis_size(axis_name)
    x = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, devices), -1, -2)
    return _exchange(x, axis_name).reshape(*x.shape[:-2], -1)


def _unstride(x: Float[Array, "*rows n"], axis_name: str) -> Float[Array, "*rows n"]:
    """Back to blocks."""
    x = _exchange(x.reshape(*x.shape[:-1], jax.lax.axis_size(axis_name), -1), axis_name)
    return jnp.swapaxes(x, -1, -2).reshape(*x.shape[:-2], -1)


def _exchange(x: Inexact[Array, "*rows P n"], axis_name: str) -> Inexact[Array, "*rows P n"]:
    """Row q of axis P goes to device q, and row q of the result has come from it: its own inverse and transpose."""
    # On one axis: between two, jax 0.11.2 cannot transpose an all-to-all that is not tiled.
    return jax.lax.all_to_all(x, axis_name, split_axis=x.ndim - 2, concat_axis=x.ndim - 2)


def _outer_stage(x: Complex[Array, "*rows half"], points: int, axis_name: str) -> Complex[Array, "*rows P columns"]:
    """All k1 of this device's columns k2, from all columns of this device's p."""
    devices = jax.lax.axis_size(axis_name)
    x = x * _twiddles(points, axis_name, x.dtype)
    padding = -x.shape[-1] % devices  # columns of zeros, fewer than P
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, padding),)).reshape(*x.shape[:-1], devices, -1)
    x = _exchange(x, axis_name)
    return jnp.einsum("kp,...pc->...kc", _dft(devices, x.dtype), x, precision="highest")


def _inverse_outer_stage(
    x: Complex[Array, "*rows P columns"], points: int, axis_name: str
) -> Complex[Array, "*rows half"]:
    devices = jax.lax.axis_size(axis_name)
    x = jnp.einsum("pk,...kc->...pc", jnp.conj(_dft(devices, x.dtype)) / devices, x, precision="highest")
    x = _exchange(x, axis_name)
    x = x.reshape(*x.shape[:-2], -1)[..., : points // 2 + 1]
    return x * jnp.conj(_twiddles(points, axis_name, x.dtype))


def _twiddles(points: int, axis_name: str, dtype: jnp.dtype) -> Complex[Array, " half"]:
    """w_N^(k2 p) of this device's p: at most half a turn, made on the device as all of them are as long as u."""
    devices, real = jax.lax.axis_size(axis_name), jnp.finfo(dtype).dtype
    turns = jnp.arange(points // 2 + 1, dtype=real) * jax.lax.axis_index(axis_name).astype(real)
    angle = turns * (-2 * math.pi / (devices * points))
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def _dft(points: int, dtype: jnp.dtype) -> Complex[Array, "{points} {points}"]:
    product = np.outer(np.arange(points), np.arange(points)) % points
    return jnp.asarray(np.exp(-2j * np.pi * product / points), dtype)


def _axis_size(axis_name: str) -> int:
    try:
        return jax.lax.axis_size(axis_name)
    except (NameError, TypeError):
        names = jax.sharding.get_abstract_mesh().manual_axes
        among = f"of {names}" if names else "of which there are none: call this inside jax.shard_map"
        raise ValueError(f"axis_name must be a manual axis of the mesh, {among}; got {axis_name!r}.") from None


def _resolve_split(split: Any, devices: int, features: int) -> Split:
    if split is None:
        return "frequencies" if features % devices else "features"
    if split not in _SPLITS:
        raise ValueError(f"split must be None or of {_SPLITS}; got {split!r}.")
    if split == "features" and features % devices:
        raise ValueError(f"split must be 'frequencies' where P = {devices} does not divide D = {features}.")
    return split


def _must_divide(what: str, length: int, devices: int, axis_name: str, *, square: bool = True) -> None:
    """Raises where P, or its square, does not divide the length."""
    unit = devices**2 if square else devices
    if length % unit:
        below = length - length % unit
        nearest = f"{below} and {below + unit} are" if below else f"{unit} is"
        divisor = f"P^2 = {unit}, P = {devices}" if square else f"P = {devices}"
        raise ValueError(
            f"{what} = {length} steps cannot be split over axis {axis_name!r}, since {divisor}, does not divide it; "
            f"the nearest that can: {nearest}."
        )


def _placed(x: Array, mesh: Mesh, spec: PartitionSpec) -> Array:
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))
