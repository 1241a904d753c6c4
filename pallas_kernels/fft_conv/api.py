"""`fft_conv`: checks, padding, choice of configuration, derivatives and sharding around the kernels."""

import functools
from typing import NamedTuple

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

from pallas_kernels.fft_conv import blocked, kernel_sm90, spectrum_sm90, streamed_sm90, three_pass, tiles
from pallas_kernels.fft_conv.config import (
    BLOCK,
    LONGEST_ON_CHIP,
    MAX_BLOCKS,
    MAX_CHANNELS,
    N1,
    Config,
    Kernel,
    forward_kernel,
    second_factor,
)
from pallas_kernels.fft_conv.lowering import lowered_once, traced_once
from pallas_kernels.fft_conv.outer_plan import LONGEST, outer_plan
from pallas_kernels.fft_conv.platform import on_cuda, varying_alike
from pallas_kernels.fft_conv.reference import backward_reference, forward_reference, gated
from pallas_kernels.fft_conv.tables import convolution_tables, dft_tables, tap_cotangent
from pallas_kernels.fft_conv.tuned import configuration

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
    """Convolution by the fused right-angle butterfly on Hopper GPUs: up to 16,384 steps one launch for each direction.

    ``y[t] = post_gate[t] * sum_s taps[t - s] (pre_gate * u)[s]``, plus ``reverse_taps[m - 1]`` at lag -m. Taps that
    reach beyond the sequence must have been cut off: K <= L and M <= L - 1.

    Products are of 16-bit numbers with float32 sums, in the dtype of u; a float32 u is rounded to bfloat16. The error
    against float64 is at most 7e-3 in relative L2 norm for bfloat16 and 2.5e-3 for float16.

    Transforms have 1024, 2048 or 4096 points and the kernels pad on chip; they read sequences of a multiple of 128, 256
    or 512 steps as they lie. Others are copied once to the next such length, and the result is cut from a longer one.
    Longer sequences, up to 16,384 steps, are blocks of 4096 steps whose spectra meet on chip (`block_toeplitz`), causal
    ones up to 32,768 (`streamed_sm90`), with gates forward alone; their way back leaves spectra of both sequences in
    memory, of four times the size of u. Up to 4,194,304 steps three passes over memory do it, with intermediates of
    four times the size of u (`three_pass`); those pad to a multiple of 32,768 steps, or of 131,072 between 524,288 and
    1,048,576.

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
        raise NotImplementedError(f"the kernels take sequences of at most {LONGEST} steps; got {length}.")
    # Three passes keep two numbers for each step in between.
    bits = 31 if length <= LONGEST_ON_CHIP else 30
    if batch * channels * features * length >= 2**bits:
        raise NotImplementedError(
            f"the kernel for {length} steps addresses fewer than 2**{bits} numbers; got a result of shape "
            f"{(batch, channels, features, length)}. Divide the batch."
        )
    u, taps, reverse_taps, pre_gate, post_gate = varying_alike(u, taps, reverse_taps, pre_gate, post_gate)
    n2 = second_factor(length)
    rows = functools.partial(_rows, n2=n2, dtype=dtype)
    results = []
    for first in range(0, channels, MAX_CHANNELS):
        group = slice(first, first + MAX_CHANNELS)
        placed = _place(taps[group], None if reverse_taps is None else reverse_taps[group], N1 * n2, length)
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


def _place(taps, reverse_taps, points, length):
    """`(D, C, blocks, points)` in float32: the lags from 0, or from -length where there are reverse taps, by blocks.

    A single block is left as short as the taps are.
    """
    blocks = -(-length // points)
    lags = taps.astype(jnp.float32)
    if blocks > 1 or reverse_taps is not None:
        lags = jnp.pad(lags, [(0, 0), (0, 0), (0, blocks * points - lags.shape[-1])])
    if reverse_taps is not None:
        ahead = jnp.flip(reverse_taps.astype(jnp.float32), -1)
        ahead = jnp.pad(ahead, [(0, 0), (0, 0), (blocks * points - ahead.shape[-1], 0)])
        lags = jnp.concatenate([ahead, lags], -1)
    lags = lags.reshape(*lags.shape[:2], -1, min(points, lags.shape[-1]))
    return lags.swapaxes(0, 1)


def _blocks(u, taps):
    """How many blocks of n steps u has, and whether taps reach ahead: there are twice as many blocks of them then."""
    blocks = -(-u.shape[-2] // N1)
    return blocks, taps.shape[2] > blocks


def _on_chip(u, taps):
    """Whether one launch convolves the sequence; if not, three passes do."""
    blocks, ahead = _blocks(u, taps)
    return blocks <= (MAX_BLOCKS if ahead else streamed_sm90.MAX_BLOCKS)


def _on_chip_back(u, taps, gates):
    """Whether cotangents come without three passes: of more than `MAX_BLOCKS` blocks those of causal taps, no gates."""
    blocks, ahead = _blocks(u, taps)
    return blocks <= MAX_BLOCKS or (not ahead and blocks <= streamed_sm90.MAX_BLOCKS and not gates.pre | gates.post)


class _Gates(NamedTuple):
    """Which of the gates there are, and whether the way back follows, so that it may share what the way there makes."""

    pre: bool
    post: bool
    both_ways: bool


@jax.custom_vjp
def _conv(u, pre_gate, post_gate, taps):
    """The convolution in the kernels' shapes: u `(B, D, rows, n2)`, result `(B, C, D, rows, n2)`."""
    gates, *sequences = _sequences(u, pre_gate, post_gate)
    return _forward(gates)(*sequences, taps)


def _conv_fwd(u, pre_gate, post_gate, taps):
    gates, *sequences = _sequences(u, pre_gate, post_gate, both_ways=True)
    return _forward(gates)(*sequences, taps), (u, pre_gate, post_gate, taps)


def _conv_bwd(saved, g):
    u, pre_gate, post_gate, taps = saved
    *shares, d_taps = _conv_cotangents(u, pre_gate, post_gate, g, taps)

    def total(shares, x):
        if x is None:
            return None
        one = shares.shape[1] == 1 or shares.shape == x.shape
        whole = shares if one else shares.astype(jnp.float32).sum(1, keepdims=True).astype(x.dtype)
        return whole if whole.ndim == x.ndim else whole[:, 0]

    return *map(total, shares, (u, pre_gate, post_gate)), d_taps


_conv.defvjp(_conv_fwd, _conv_bwd)


def _sequences(u, pre_gate, post_gate, both_ways: bool = False):
    """The `_Gates`, and u and both gates.

    custom_partitioning knows no optional operands: u stands in for an absent gate, and no kernel reads it.
    """
    gates = _Gates(pre_gate is not None, post_gate is not None, both_ways)
    return gates, u, pre_gate if gates.pre else u, post_gate if gates.post else u[:, None]


@jax.custom_vjp
def _conv_cotangents(u, pre_gate, post_gate, g, taps):
    """Cotangents of u and of the gates, of each a share for each channel `(B, C, D, rows, n2)`; and of the taps."""
    gates, *sequences = _sequences(u, pre_gate, post_gate)
    d_u, *d_gates, d_taps = _backward(gates)(*sequences, g, taps)
    d_pre, d_post = (d_gates.pop(0) if gate else None for gate in (gates.pre, gates.post))
    return d_u, d_pre, d_post, d_taps


def _conv_cotangents_fwd(*arguments):
    return _conv_cotangents(*arguments), arguments


def _conv_cotangents_bwd(saved, cotangents):
    def product(x, gate):
        return x if gate is None else x.astype(jnp.float32) * gate.astype(jnp.float32)

    def cotangents_of(u, pre_gate, post_gate, g, taps):
        def flat(x):
            return x.reshape(*x.shape[:-2], -1)

        def share(x):
            return None if x is None else x.reshape(g.shape).astype(g.dtype)

        x, h = flat(product(u, pre_gate)), flat(product(g, post_gate))
        dx, d_taps = backward_reference(x, h, taps)
        dx = dx.reshape(g.shape)
        d_u = product(dx, None if pre_gate is None else pre_gate[:, None])
        d_pre = None if pre_gate is None else product(dx, u[:, None])
        d_post = None if post_gate is None else product(forward_reference(x, taps).reshape(g.shape), g)
        return share(d_u), share(d_pre), share(d_post), d_taps

    return jax.vjp(cotangents_of, *saved)[1](cotangents)


_conv_cotangents.defvjp(_conv_cotangents_fwd, _conv_cotangents_bwd)


def _run_forward(u, pre_gate, post_gate, taps, f1, f2, twiddle, shift, gates: _Gates):
    if not _on_chip(u, taps):
        return _run_long_forward(gates, u, pre_gate, post_gate, taps, shift)
    if _blocks(u, taps)[0] > 1:
        return _run_blocked_forward(gates, u, pre_gate, post_gate, taps, f1, f2, twiddle, shift)
    pre, post, _ = gates
    batch, features, length, n2 = u.shape
    channels = taps.shape[1]
    config = configuration(forward_kernel(channels, pre or post), n2, u.dtype)
    shapes = tiles.Shapes(
        batch, channels, features, length, u.dtype, pre_gate=pre, post_gates=post_gate.shape[1] if post else 0
    )
    tables = f1, f2, twiddle
    spectrum = _spectra(u, taps, config, *tables, shift).reshape(features, -1, N1, n2)
    kernel = lowered_once(kernel_sm90.forward, config, shapes)
    operands = (table.astype(u.dtype) for table in convolution_tables(*tables))
    return kernel(u, pre_gate, post_gate, spectrum, *operands, shift)


def _run_backward(u, pre_gate, post_gate, g, taps, f1, f2, twiddle, shift, gates: _Gates):
    if not _on_chip_back(u, taps, gates):
        return _run_long_backward(gates, u, pre_gate, post_gate, g, taps, shift)
    if _blocks(u, taps)[0] > 1:
        return _run_blocked_backward(gates, u, pre_gate, post_gate, g, taps, f1, f2, twiddle, shift)
    pre, post, _ = gates
    batch, features, length, n2 = u.shape
    channels = taps.shape[1]
    config = configuration(Kernel.BACKWARD_GATED if pre or post else Kernel.BACKWARD, n2, u.dtype)
    shapes = tiles.Shapes(
        batch, channels, features, length, u.dtype, pre_gate=pre, post_gates=post_gate.shape[1] if post else 0
    )
    tables = f1, f2, twiddle
    spectrum = _spectra(u, taps, config, *tables, shift).reshape(-1, 2, N1, n2)
    kernel = lowered_once(kernel_sm90.backward, config, shapes)
    operands = (table.astype(u.dtype) for table in convolution_tables(*tables))
    *shares, d_spectrum = kernel(u, pre_gate, post_gate, g, spectrum, *operands, shift)
    return *shares, _taps_cotangent(u, taps, config, d_spectrum)


def _spectra(u, taps, config, *tables):
    """`(D, C, lags, 2, 64, n2)` in the dtype of u, or as `streamed_sm90` takes them."""
    blocks, ahead = _blocks(u, taps)
    flat = taps.reshape(-1, *taps.shape[2:])
    streamed = blocks > MAX_BLOCKS
    kernel = traced_once(spectrum_sm90.tap_transform, config.n2, config.blocks, u.dtype, ahead, streamed)
    spectra = kernel(flat, *tables)
    return spectra.reshape(*taps.shape[:2], *spectra.shape[1:])


def _taps_cotangent(u, taps, config, d_spectra):
    """From that of the spectra, in parts: `(parts, D ..., 64, n2)`."""
    _, ahead = _blocks(u, taps)
    taps, d_spectra = varying_alike(taps, d_spectra)
    flat = taps.reshape(-1, *taps.shape[2:])
    d_spectra = d_spectra.sum(0).reshape(flat.shape[0], -1, 2, N1, config.n2)
    return tap_cotangent(d_spectra, flat, config, before=ahead).reshape(taps.shape)


def _run_blocked_forward(gates, u, pre_gate, post_gate, taps, *tables):
    """`_run_forward` for sequences of several blocks."""
    spectra = _spectra(u, taps, Config(u.shape[-1]), *tables)
    return blocked.forward(*_with_channels(gates, u, pre_gate, post_gate), spectra, _lags(u, taps), *tables)


def _run_blocked_backward(gates, u, pre_gate, post_gate, g, taps, *tables):
    """`_run_backward` likewise."""
    config = Config(u.shape[-1])
    spectra = _spectra(u, taps, config, *tables)
    x, pre_gate, post_gate = _with_channels(gates, u, pre_gate, post_gate)
    d_x, d_post, d_spectra = blocked.backward(x, pre_gate, post_gate, g, spectra, _lags(u, taps), *tables)
    return *_shares(d_x, d_post, x, pre_gate), _taps_cotangent(u, taps, config, d_spectra)


def _run_long_forward(gates, u, pre_gate, post_gate, taps, shift):
    """`_run_forward` in three passes."""
    x, pre_gate, post_gate = (_in_blocks(x) for x in _with_channels(gates, u, pre_gate, post_gate))
    blocks, before = _blocks(u, taps)
    plan = outer_plan(blocks, x.shape[0], both_ways=gates.both_ways)
    y = three_pass.forward(x, pre_gate, post_gate, taps, plan, shift, before=before)
    return _of_rows(y, u)


def _run_long_backward(gates, u, pre_gate, post_gate, g, taps, shift):
    """`_run_backward` likewise."""
    x, pre_gate, post_gate, g = (_in_blocks(x) for x in (*_with_channels(gates, u, pre_gate, post_gate), g))
    blocks, before = _blocks(u, taps)
    plan = outer_plan(blocks, x.shape[0], both_ways=True)
    d_x, d_post, d_taps = three_pass.backward(x, pre_gate, post_gate, g, taps, plan, shift, before=before)
    return *(_of_rows(share, u) for share in _shares(d_x, d_post, x, pre_gate)), d_taps


def _shares(d_x, d_post, x, pre_gate):
    """Cotangents of u and of the gates that there are, from those of pre u and of a post gate."""
    shares = [d_x] if pre_gate is None else [gated(d_x, pre_gate), gated(d_x, x)]
    return shares if d_post is None else [*shares, d_post]


def _in_blocks(x):
    """`(..., rows, 64)` as `(..., blocks, 4096)`, padded to a multiple of 8 blocks: tiles are 8 of them high."""
    if x is None:
        return None
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % (8 * N1)), (0, 0)])
    return padded.reshape(*x.shape[:-2], -1, BLOCK)


def _of_rows(y, u):
    """`(..., blocks, 4096)` as `(..., rows, 64)` with the rows of u."""
    return y.reshape(*y.shape[:-2], -1, u.shape[-1])[..., : u.shape[-2], :]


def _with_channels(gates, u, pre_gate, post_gate):
    """What there is of u and the gates, each `(B, 1 or C, D, rows, 64)`."""
    return u[:, None], pre_gate[:, None] if gates.pre else None, post_gate if gates.post else None


def _lags(u, taps):
    """First and last lag of the blocks."""
    blocks, ahead = _blocks(u, taps)
    return (1 - blocks if ahead else 0), blocks - 1


def _tables(u):
    """Operands that every kernel takes last; custom_partitioning refuses constants."""
    return *dft_tables(Config(u.shape[-1]), jnp.float32), jnp.array([_SHIFT], jnp.int32)


@functools.cache
def _forward(gates: _Gates):
    """The forward kernel where there is a GPU; vmap makes of its axis more features."""

    @custom_vmap
    def forward(u, pre_gate, post_gate, taps):
        return _on_gpu(_forward_op, u, pre_gate, post_gate, taps, *_tables(u), static=(gates,))

    @forward.def_vmap
    def _(size, batched, *operands):
        y = forward(*_more_features(size, batched, operands, features=(1, 1, 2, 0)))
        return _fewer_features(size, y, 2), True

    return forward


@functools.cache
def _backward(gates: _Gates):
    """The backward kernel likewise: cotangents of u, of the gates that there are and of the taps."""

    @custom_vmap
    def backward(u, pre_gate, post_gate, g, taps):
        return _on_gpu(_backward_op, u, pre_gate, post_gate, g, taps, *_tables(u), static=(gates,))

    @backward.def_vmap
    def _(size, batched, *operands):
        *shares, d_taps = backward(*_more_features(size, batched, operands, features=(1, 1, 2, 2, 0)))
        results = *(_fewer_features(size, x, 2) for x in shares), _fewer_features(size, d_taps, 0)
        return results, (True,) * len(results)

    return backward


def _more_features(size, batched, operands, features):
    """The vmapped leading axis of each operand, or copies of what has none, as part of its axis of features."""
    for x, has_axis, axis in zip(operands, batched, features, strict=True):
        whole = jnp.moveaxis(x if has_axis else jnp.broadcast_to(x, (size, *x.shape)), 0, axis)
        yield whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])


def _fewer_features(size, x, axis):
    return jnp.moveaxis(x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :]), axis, 0)


_forward_op = custom_partitioning(_run_forward, static_argnums=(8,))
_backward_op = custom_partitioning(_run_backward, static_argnums=(9,))


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


def _partition_backward(gates, mesh, arguments, results):
    b, d = _axes(arguments)

    def place(spec):
        return NamedSharding(mesh, spec)

    def run(*operands):
        *shares, d_taps = functools.partial(_run_backward, gates=gates)(*operands)
        return *shares, jax.lax.psum(d_taps, b) if b else d_taps

    shardings = [P(b, d), P(b, d), P(b, None, d), P(b, None, d), P(d), *_TABLES]
    return mesh, run, tuple(map(place, _backward_specs(gates, b, d))), tuple(place(spec) for spec in shardings)


def _backward_specs(gates, b, d):
    """Of the results."""
    return (P(b, None, d),) * (1 + gates.pre + gates.post) + (P(d),)


def _backward_rule(gates, mesh, operands, results):
    shares = "b c d l n, " * (1 + gates.pre + gates.post)
    rule = f"b d l n, b d l n, b p d l n, b c d l n, d k i j, r s t, v w x, y z e, f -> {shares}d k i j"
    return rule, {"need_replication_factors": tuple("lnpckijrstvwxyzef")}


_forward_op.def_partition(
    _partition_forward,
    sharding_rule="b d l n, b d l n, b p d l n, d k i j, r s t, v w x, y z e, f -> b c d l n",
    need_replication_factors=tuple("lnpkijrstvwxyzefc"),
)
_backward_op.def_partition(_partition_backward, sharding_rule=_backward_rule)


def _on_gpu(op, *operands, static: tuple = ()):
    """Runs where it is lowered for CUDA, each shard on its device; or in the interpreter, which knows no shards."""
    if jax_config.pallas_tpu_interpret_mode_context_manager.value is not None:
        return op.fun(*operands, *static)

    def refuse(result, *operands):
        return _needs_cuda_p.bind(*operands, shape=result.shape, dtype=result.dtype)

    by_platform = functools.partial(on_cuda, lambda *x: op(*x, *static), refuse)
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return by_platform(*operands)
    # Pallas indexes no arrays whose sharding is part of their type.
    b, d = _axes([jax.typeof(operands[0])])
    out_sharding = _backward_specs(static[0], b, d) if op is _backward_op else P(b, None, d)
    return jax.sharding.auto_axes(by_platform, out_sharding=out_sharding)(*operands)


_needs_cuda_p = Primitive("fft_conv_needs_cuda")


@_needs_cuda_p.def_abstract_eval
def _(*operands, shape, dtype, instead=None):
    return operands[0].update(shape=shape, dtype=dtype)


def _refuse(ctx, *_, instead="xla", **__):
    (platform,) = ctx.module_context.platforms
    raise NotImplementedError(
        f'implementation "mosaic_gpu" runs on CUDA devices; this computation is for {platform!r}. '
        f'Use implementation="{instead}" or None here, or plgpu.force_gpu_interpret_mode() to test the kernel.'
    )


mlir.register_lowering(_needs_cuda_p, _refuse)
