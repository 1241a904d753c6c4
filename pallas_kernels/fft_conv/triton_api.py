"""`fft_conv_triton`: checks, derivatives and sharding of the Triton kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.fft_conv import triton_launch
from pallas_kernels.fft_conv.platform import on_cuda, varying_alike
from pallas_kernels.fft_conv.reference import forward_reference
from pallas_kernels.fft_conv.triton_passes import compute_dtype, flat_tables, plan_of, run_backward, run_forward
from pallas_kernels.fft_conv.triton_plans import plan_for


def fft_conv_triton(
    u: Float[Array, "B D L"],
    taps: Float[Array, "C D K"],
    reverse_taps: Float[Array, "C D M"] | None = None,
    *,
    pre_gate: Float[Array, "B D L"] | None = None,
    post_gate: Float[Array, "B #C D L"] | None = None,
) -> Float[Array, "B C D L"]:
    """Convolution by the fused right-angle butterfly in Triton, on NVIDIA GPUs of compute capability 8.0 and newer.

    ``y[t] = post_gate[t] * sum_s taps[t - s] (pre_gate * u)[s]``, plus ``reverse_taps[m - 1]`` at lag -m. Taps that
    reach beyond the sequence must have been cut off: K <= L and M <= L - 1.

    Products are of 16-bit numbers with float32 sums, in the dtype of u; those of a float32 u are of bfloat16 ones, its
    gates and its result float32. The error against float64 is at most 7e-3 in relative L2 norm for bfloat16 and 2.5e-3
    for float16.

    Transforms have 1024, 2048, 4096 or 8192 points; sequences are read as they lie, of any length up to that. One
    launch convolves. Derivatives save the arguments alone: one launch gives those of u and of its gate, another that of
    the gate of the result, and a third sums the taps' in the form of spectra over the batch, before their one inverse
    transform. Up to 2048 steps the first and the third are one on GPUs of compute capability 9.0 and 10.0.
    Second derivatives go through `jnp.fft`. Under a sharded jit each device works on its own rows and features.

    Raises:
      NotImplementedError: for lengths, sizes or dtypes that no kernel has; without a CUDA device; on a device for which
        there are no kernels; and for versions of jax, jax-triton and triton that do not work together.

    Example:
      >>> import jax.numpy as jnp
      >>> fft_conv_triton(jnp.ones((2, 3, 8), jnp.float8_e4m3fn), jnp.ones((1, 3, 7)))
      Traceback (most recent call last):
      NotImplementedError: the Triton kernels take bfloat16, float16 and float32; got float8_e4m3fn.
    """
    compute_dtype(u.dtype)
    plan = plan_for(u.shape[-1], triton_launch.this_card())
    lags = taps.astype(jnp.float32)
    lags = jnp.pad(lags, [(0, 0), (0, 0), (0, plan.points - lags.shape[-1])])[:, :, None]
    if reverse_taps is not None:
        ahead = jnp.flip(reverse_taps.astype(jnp.float32), -1)
        ahead = jnp.pad(ahead, [(0, 0), (0, 0), (plan.points - ahead.shape[-1], 0)])[:, :, None]
        lags = jnp.concatenate([ahead, lags], 2)
    pre_gate = None if pre_gate is None else pre_gate.astype(u.dtype)[:, None]
    post_gate = None if post_gate is None else post_gate.astype(u.dtype)
    return _conv(*varying_alike(u[:, None], pre_gate, post_gate, lags.swapaxes(0, 1)))


class _Arguments(NamedTuple):
    """Residuals: u and the gate `(B, 1, D, L)`, the other gate `(B, 1 or C, D, L)`, the taps `(D, C, 1 or 2, n)`."""

    u: jax.Array
    pre_gate: jax.Array | None
    post_gate: jax.Array | None
    taps: jax.Array


@jax.custom_vjp
def _conv(u, pre_gate, post_gate, taps):
    """y, `(B, C, D, L)`."""
    gates, *sequences = _sequences(u, pre_gate, post_gate)
    return _forward(gates)(*sequences, taps)


def _conv_fwd(u, pre_gate, post_gate, taps):
    return _conv(u, pre_gate, post_gate, taps), _Arguments(u, pre_gate, post_gate, taps)


def _conv_bwd(saved, g):
    *shares, d_taps = _cotangents(*saved, g)

    def total(share, x):
        if x is None or share.shape == x.shape:
            return share
        return share.astype(jnp.float32).sum(1, keepdims=True).astype(x.dtype)

    return *map(total, shares, saved[:3]), d_taps


_conv.defvjp(_conv_fwd, _conv_bwd)


def _sequences(u, pre_gate, post_gate):
    """Which of the gates there are, and u and both; custom_partitioning knows no optional operands."""
    gates = pre_gate is not None, post_gate is not None
    return gates, u, pre_gate if gates[0] else u, post_gate if gates[1] else u


@jax.custom_vjp
def _cotangents(u, pre_gate, post_gate, taps, g):
    """Cotangents of u and of the gates, of each a share for each channel `(B, C, D, L)`, and of the taps."""
    gates, *sequences = _sequences(u, pre_gate, post_gate)
    d_u, *d_gates, d_taps = _backward(gates)(*sequences, g, taps)
    return d_u, *(d_gates.pop(0) if gate else None for gate in gates), d_taps


def _cotangents_fwd(*arguments):
    return _cotangents(*arguments), arguments


def _cotangents_bwd(saved, cotangents):
    return jax.vjp(_reference_cotangents, *saved)[1](cotangents)


_cotangents.defvjp(_cotangents_fwd, _cotangents_bwd)


def _reference_cotangents(u, pre_gate, post_gate, taps, g):
    """`_cotangents` in `jax.numpy`: each sequence spread over the channels has its share for a cotangent."""

    def convolve(u, pre_gate, post_gate, taps):
        x = u if pre_gate is None else u * pre_gate
        y = forward_reference(x, taps)
        return y if post_gate is None else y * post_gate

    spread = [None if x is None else jnp.broadcast_to(x, g.shape).astype(jnp.float32) for x in (u, pre_gate, post_gate)]
    *shares, d_taps = jax.vjp(convolve, *spread, taps)[1](g.astype(jnp.float32))
    return *(None if share is None else share.astype(g.dtype) for share in shares), d_taps


def _tables(taps):
    """An operand that every launch takes last; custom_partitioning refuses constants."""
    return flat_tables(plan_of(taps, triton_launch.this_card()))


@functools.cache
def _forward(gates: tuple[bool, bool]):
    """The forward launch where there is a GPU; vmap makes of its axis more features."""

    @custom_vmap
    def forward(u, pre_gate, post_gate, taps):
        return _on_gpu(_forward_op, run_forward, gates, u, pre_gate, post_gate, taps, _tables(taps))

    @forward.def_vmap
    def _(size, batched, *operands):
        y = forward(*_more_features(size, batched, operands, features=(2, 2, 2, 0)))
        return _fewer_features(size, y, 2), True

    return forward


@functools.cache
def _backward(gates: tuple[bool, bool]):
    """The backward launches likewise: cotangents of u, of the gates that there are and of the taps."""

    @custom_vmap
    def backward(u, pre_gate, post_gate, g, taps):
        return _on_gpu(_backward_op, run_backward, gates, u, pre_gate, post_gate, g, taps, _tables(taps))

    @backward.def_vmap
    def _(size, batched, *operands):
        *shares, d_taps = backward(*_more_features(size, batched, operands, features=(2, 2, 2, 2, 0)))
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


def _shardings(u_spec, gates, *, backward: bool):
    """Of the operands and of the results, for u sharded so: its batch and its features, and nothing else, divided."""
    b, _, d, _ = (*u_spec, None, None, None, None)[:4]
    sequence, tables = P(b, None, d), (P(),)
    if backward:
        return (*(sequence,) * 4, P(d), *tables), (*(sequence,) * (1 + sum(gates)), P(d)), b
    return (*(sequence,) * 3, P(d), *tables), sequence, b


def _partition_forward(gates, mesh, arguments, result):
    operands, y, _ = _shardings(arguments[0].sharding.spec, gates, backward=False)
    shardings = tuple(NamedSharding(mesh, spec) for spec in operands)
    return mesh, functools.partial(run_forward, gates=gates), NamedSharding(mesh, y), shardings


def _partition_backward(gates, mesh, arguments, results):
    operands, shares, b = _shardings(arguments[0].sharding.spec, gates, backward=True)

    def run(*operands):
        *shares, d_taps = run_backward(*operands, gates=gates)
        return *shares, jax.lax.psum(d_taps, b) if b else d_taps

    operands, shares = (tuple(NamedSharding(mesh, spec) for spec in specs) for specs in (operands, shares))
    return mesh, run, shares, operands


def _backward_rule(gates, mesh, operands, results):
    shares = "b c d l, " * (1 + sum(gates))
    rule = f"b s d l, b p d l, b q d l, b c d l, d c a n, x -> {shares}d c a n"
    return rule, {"need_replication_factors": tuple("slpqcanx")}


def _named_gates(run, position: int):
    """With the gates as the positional argument that custom_partitioning asks static ones to be."""
    return lambda *arguments: run(*arguments[:position], gates=arguments[position])


_forward_op = custom_partitioning(_named_gates(run_forward, 5), static_argnums=(5,))
_backward_op = custom_partitioning(_named_gates(run_backward, 6), static_argnums=(6,))
_forward_op.def_partition(
    _partition_forward,
    sharding_rule="b s d l, b p d l, b q d l, d c a n, x -> b c d l",
    need_replication_factors=tuple("slpqcanx"),
)
_backward_op.def_partition(_partition_backward, sharding_rule=_backward_rule)


def _on_gpu(op, run, gates, *operands):
    """Runs where it is lowered for CUDA, each shard on its device; or in the interpreter, which knows no shards."""
    if triton_launch.interpreter is not None:
        return run(*operands, gates=gates)

    def refuse(result, *operands):
        return _needs_cuda_p.bind(*operands, shape=result.shape, dtype=result.dtype)

    by_platform = functools.partial(on_cuda, lambda *x: op(*x, gates), refuse)
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return by_platform(*operands)
    _, out, _ = _shardings(jax.typeof(operands[0]).sharding.spec, gates, backward=op is _backward_op)
    return jax.sharding.auto_axes(by_platform, out_sharding=out)(*operands)


_needs_cuda_p = Primitive("fft_conv_triton_needs_cuda")


@_needs_cuda_p.def_abstract_eval
def _(*operands, shape, dtype):
    return operands[0].update(shape=shape, dtype=dtype)


def _refuse(ctx, *_, **__):
    (platform,) = ctx.module_context.platforms
    raise NotImplementedError(
        f'implementation "triton" runs on CUDA devices; this computation is for {platform!r}. Use '
        f'implementation="xla" or None here.'
    )


mlir.register_lowering(_needs_cuda_p, _refuse)
