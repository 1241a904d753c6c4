"""`fft_conv`: checks, padding, choice of configuration, derivatives and sharding around the kernels."""

import functools

import jax
import jax.numpy as jnp
from jax._src import config as jax_config  # there is no public way to ask whether kernels are being interpreted
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.fft_conv import kernel_sm90, spectrum_sm90
from pallas_kernels.fft_conv.config import (
    CONFIGS,
    LONGEST,
    MAX_CHANNELS,
    N1,
    Config,
    Kernel,
    forward_kernel,
    second_factor,
)
from pallas_kernels.fft_conv.reference import backward_reference
from pallas_kernels.fft_conv.tables import dft_tables, tap_cotangent

# The kernels shift their loop counter right by this, to a zero that the compiler takes for a variable.
_SHIFT = 31


def fft_conv(
    u: Float[Array, "B D L"],
    taps: Float[Array, "C D K"],
    reverse_taps: Float[Array, "C D M"] | None = None,
    *,
    pre_gate: Float[Array, "B D L"] | None = None,
    post_gate: Float[Array, "B #C D L"] | None = None,
) -> Float[Array, "B C D L"]:
    """Convolution by the fused right-angle butterfly on Hopper GPUs: one kernel launch for each direction.

    ``y[t] = post_gate[t] * sum_s taps[t - s] (pre_gate * u)[s]``, plus ``reverse_taps[m - 1]`` at lag -m. Taps that
    reach beyond the sequence must have been cut off: K <= L and M <= L - 1.

    Products are of 16-bit numbers with float32 sums, in the dtype of u; a float32 u is rounded to bfloat16. The error
    against float64 is at most 7e-3 in relative L2 norm for bfloat16 and 2.5e-3 for float16.

    Transforms have 1024, 2048 or 4096 points and the kernels pad on chip; they read sequences of a multiple of 128, 256
    or 512 steps as they lie. Others are copied once to the next such length, and the result is cut from a longer one.

    Derivatives save the arguments alone and recompute all spectra; second derivatives go through `jnp.fft`. Under a
    sharded jit each device works on its own rows and features.

    Raises:
      NotImplementedError: for lengths, sizes or dtypes that no kernel has, and on being run without a CUDA device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> u, taps = jnp.ones((2, 3, 1024), jnp.bfloat16), jnp.ones((1, 3, 7))
      >>> lowered = jax.jit(fft_conv).trace(u, taps).lower(lowering_platforms=("cuda",))
      >>> "mosaic_gpu" in lowered.as_text()
      True
    """
    batch, features, length = u.shape
    channels = taps.shape[0]
    dtype = _compute_dtype(u.dtype)
    if length > LONGEST:
        raise NotImplementedError(f"the fused kernel takes sequences of at most {LONGEST} steps; got {length}.")
    if batch * channels * features * length >= 2**31:
        raise NotImplementedError(
            f"the fused kernel addresses fewer than 2**31 numbers; got a result of shape "
            f"{(batch, channels, features, length)}."
        )
    n2 = second_factor(length)
    rows = functools.partial(_rows, n2=n2, dtype=dtype)
    results = []
    for first in range(0, channels, MAX_CHANNELS):
        group = slice(first, first + MAX_CHANNELS)
        placed = _place(taps[group], None if reverse_taps is None else reverse_taps[group], Config(n2).points)
        gate = post_gate if post_gate is None or post_gate.shape[1] == 1 else post_gate[:, group]
        results.append(_conv(rows(u), rows(pre_gate), rows(gate), placed))
    y = jnp.concatenate(results, 1) if len(results) > 1 else results[0]
    return y.reshape(*y.shape[:3], -1)[..., :length].astype(u.dtype)


def _compute_dtype(dtype):
    if dtype in (jnp.bfloat16, jnp.float16):
        return dtype
    if dtype == jnp.float32:
        return jnp.dtype(jnp.bfloat16)
    raise NotImplementedError(f"the fused kernel takes bfloat16, float16 and float32; got {dtype}.")


def _rows(x, *, n2, dtype):
    """`(..., L)` as `(..., L / n2, n2)`, padded to a multiple of 8 n2: tiles in shared memory are 8 rows high."""
    if x is None:
        return None
    padded = jnp.pad(x.astype(dtype), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % (8 * n2))])
    return padded.reshape(*x.shape[:-1], -1, n2)


def _place(taps, reverse_taps, points):
    """`(D, C, parts, K)` in float32: taps at their lags and, if there are any, the reverse tap of lag -m at n - m."""
    parts = [taps.astype(jnp.float32)]
    if reverse_taps is not None:
        before = points - reverse_taps.shape[-1]
        parts = [jnp.pad(parts[0], [(0, 0), (0, 0), (0, points - taps.shape[-1])])]
        parts += [jnp.pad(jnp.flip(reverse_taps.astype(jnp.float32), -1), [(0, 0), (0, 0), (before, 0)])]
    return jnp.stack(parts, 2).swapaxes(0, 1)


@jax.custom_vjp
def _conv(u, pre_gate, post_gate, taps):
    """The convolution in the kernels' shapes: u `(B, D, rows, n2)`, result `(B, C, D, rows, n2)`."""
    gates = pre_gate is not None, post_gate is not None
    # custom_partitioning knows no optional operands: u stands in for an absent gate, and the kernel does not read it.
    pre_gate = pre_gate if gates[0] else u
    post_gate = post_gate if gates[1] else u[:, None]
    return _forward(gates)(u, pre_gate, post_gate, taps)


def _conv_fwd(u, pre_gate, post_gate, taps):
    return _conv(u, pre_gate, post_gate, taps), (u, pre_gate, post_gate, taps)


def _conv_bwd(saved, g):
    u, pre_gate, post_gate, taps = saved
    gated = u if pre_gate is None else _product(u, pre_gate)
    d_post = None
    if post_gate is not None:
        d_post = _product(g, _conv(gated, None, None, taps), jnp.float32)
        d_post = d_post.sum(1, keepdims=True) if post_gate.shape[1] == 1 else d_post
        g = _product(g, post_gate)
    d_gated, d_taps = _conv_cotangents(gated, g, taps)
    d_gated = d_gated[:, 0] if d_gated.shape[1] == 1 else d_gated.astype(jnp.float32).sum(1)
    d_u = d_gated if pre_gate is None else _product(d_gated, pre_gate)
    d_pre = None if pre_gate is None else _product(d_gated, u)

    def like(x, y):
        return None if x is None else x.astype(y.dtype)

    return like(d_u, u), like(d_pre, pre_gate), like(d_post, post_gate), d_taps


_conv.defvjp(_conv_fwd, _conv_bwd)


def _product(x, y, dtype=None):
    return (x.astype(jnp.float32) * y.astype(jnp.float32)).astype(dtype or x.dtype)


@jax.custom_vjp
def _conv_cotangents(u, g, taps):
    """Cotangents of u for each channel, `(B, C, D, rows, n2)`, and of the taps, of an ungated convolution."""
    return _backward(u, g, taps)


def _conv_cotangents_fwd(u, g, taps):
    return _conv_cotangents(u, g, taps), (u, g, taps)


def _conv_cotangents_bwd(saved, cotangents):
    u, g, taps = saved

    def flat(x):
        return x.reshape(*x.shape[:-2], -1)

    def cotangents_of(u, g, taps):
        d_u, d_taps = backward_reference(Config(u.shape[-1]), flat(u), flat(g), taps)
        return d_u.reshape(g.shape).astype(g.dtype), d_taps

    return jax.vjp(cotangents_of, u, g, taps)[1](cotangents)


_conv_cotangents.defvjp(_conv_cotangents_fwd, _conv_cotangents_bwd)


def _run_forward(u, pre_gate, post_gate, taps, f1, f2, twiddle, shift, gates: tuple[bool, bool]):
    pre, post = gates
    batch, features, length, n2 = u.shape
    channels = taps.shape[1]
    config = CONFIGS[forward_kernel(channels, pre or post)][n2]
    shapes = kernel_sm90.Shapes(
        batch, channels, features, length, u.dtype, pre_gate=pre, post_gates=post_gate.shape[1] if post else 0
    )
    tables = f1, f2, twiddle
    spectrum = _spectrum(taps, config, u.dtype, *tables, shift).reshape(features, -1, N1, n2)
    kernel = kernel_sm90.forward(config, shapes)
    return kernel(u, pre_gate, post_gate, spectrum, *(table.astype(u.dtype) for table in tables), shift)


def _run_backward(u, g, taps, f1, f2, twiddle, shift):
    batch, features, length, n2 = u.shape
    channels = taps.shape[1]
    config = CONFIGS[Kernel.BACKWARD][n2]
    tables = f1, f2, twiddle
    spectrum = _spectrum(taps, config, u.dtype, *tables, shift)
    kernel = kernel_sm90.backward(config, kernel_sm90.Shapes(batch, channels, features, length, u.dtype))
    d_u, d_spectrum = kernel(u, g, spectrum, *(table.astype(u.dtype) for table in tables), shift)
    d_spectrum = d_spectrum.sum(0).reshape(spectrum.shape)
    return d_u, tap_cotangent(d_spectrum, taps.reshape(-1, *taps.shape[2:]), config).reshape(taps.shape)


def _spectrum(taps, config, dtype, *tables):
    """`(D C, 2, 64, n2)`."""
    return spectrum_sm90.tap_spectrum(taps.reshape(-1, *taps.shape[2:]), config, dtype, *tables)


def _tables(u):
    """Operands that every kernel takes last; custom_partitioning refuses constants."""
    return *dft_tables(Config(u.shape[-1]), jnp.float32), jnp.array([_SHIFT], jnp.int32)


@functools.cache
def _forward(gates: tuple[bool, bool]):
    """The forward kernel where there is a GPU; vmap makes of its axis more features."""

    @custom_vmap
    def forward(u, pre_gate, post_gate, taps):
        return _on_gpu(_forward_op, u, pre_gate, post_gate, taps, *_tables(u), static=(gates,))

    @forward.def_vmap
    def _(size, batched, *operands):
        y = forward(*_more_features(size, batched, operands, features=(1, 1, 2, 0)))
        return _fewer_features(size, y, 2), True

    return forward


@custom_vmap
def _backward(u, g, taps):
    return _on_gpu(_backward_op, u, g, taps, *_tables(u))


@_backward.def_vmap
def _(size, batched, *operands):
    d_u, d_taps = _backward(*_more_features(size, batched, operands, features=(1, 2, 0)))
    return (_fewer_features(size, d_u, 2), _fewer_features(size, d_taps, 0)), (True, True)


def _more_features(size, batched, operands, features):
    """The vmapped leading axis of each operand, or copies of what has none, as part of its axis of features."""
    for x, has_axis, axis in zip(operands, batched, features, strict=True):
        whole = jnp.moveaxis(x if has_axis else jnp.broadcast_to(x, (size, *x.shape)), 0, axis)
        yield whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])


def _fewer_features(size, x, axis):
    return jnp.moveaxis(x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :]), axis, 0)


_forward_op = custom_partitioning(_run_forward, static_argnums=(8,))
_backward_op = custom_partitioning(_run_backward)


_TABLES = (P(), P(), P(), P())


def _axes(arguments):
    """The mesh axes of the batch and of the features of u, the first argument."""
    spec = (*arguments[0].sharding.spec, None, None)[:2]
    return [axes if axes is None or isinstance(axes, tuple) else (axes,) for axes in spec]


def _partition_forward(gates, mesh, arguments, result):
    b, d = _axes(arguments)
    shardings = [P(b, d), P(b, d), P(b, None, d), P(d), *_TABLES]

    def place(spec):
        return NamedSharding(mesh, spec)

    return (
        mesh,
        functools.partial(_run_forward, gates=gates),
        place(P(b, None, d)),
        tuple(place(spec) for spec in shardings),
    )


def _partition_backward(mesh, arguments, results):
    b, d = _axes(arguments)

    def place(spec):
        return NamedSharding(mesh, spec)

    def run(*operands):
        d_u, d_taps = _run_backward(*operands)
        return d_u, jax.lax.psum(d_taps, b) if b else d_taps

    shardings = [P(b, d), P(b, None, d), P(d), *_TABLES]
    return mesh, run, (place(P(b, None, d)), place(P(d))), tuple(place(spec) for spec in shardings)


_forward_op.def_partition(
    _partition_forward,
    sharding_rule="b d l n, b d l n, b p d l n, d k i j, r s t, v w x, y z e, f -> b c d l n",
    need_replication_factors=tuple("lnpkijrstvwxyzefc"),
)
_backward_op.def_partition(
    _partition_backward,
    sharding_rule="b d l n, b c d l n, d k i j, r s t, v w x, y z e, f -> b c d l n, d k i j",
    need_replication_factors=tuple("lnckijrstvwxyzef"),
)


def _on_gpu(op, *operands, static=()):
    """Runs where it is lowered for CUDA, each shard on its device; or in the interpreter, which knows no shards."""
    if jax_config.pallas_tpu_interpret_mode_context_manager.value is not None:
        return op.fun(*operands, *static)

    def by_platform(*operands):
        results = jax.eval_shape(lambda *x: op(*x, *static), *operands)
        return jax.lax.platform_dependent(
            *operands,
            cuda=lambda *x: op(*x, *static),
            default=lambda *x: jax.tree.map(lambda r: _needs_cuda_p.bind(*x, shape=r.shape, dtype=r.dtype), results),
        )

    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return by_platform(*operands)
    # Pallas indexes no arrays whose sharding is part of their type.
    b, d = _axes([jax.typeof(operands[0])])
    result = P(b, None, d)
    return jax.sharding.auto_axes(by_platform, out_sharding=(result, P(d)) if op is _backward_op else result)(*operands)


_needs_cuda_p = Primitive("fft_conv_needs_cuda")


@_needs_cuda_p.def_abstract_eval
def _(*operands, shape, dtype):
    return operands[0].update(shape=shape, dtype=dtype)


def _refuse(ctx, *_, **__):
    (platform,) = ctx.module_context.platforms
    raise NotImplementedError(
        f'implementation "mosaic_gpu" runs on CUDA devices; this computation is for {platform!r}. '
        f'Use implementation="xla" or None here, or plgpu.force_gpu_interpret_mode() to test the kernel.'
    )


mlir.register_lowering(_needs_cuda_p, _refuse)
