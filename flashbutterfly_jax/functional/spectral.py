"""Real FFTs along the last axis that stay on their device under a sharded jit.

`jnp.fft` is not enough: XLA (jax 0.11.2) gathers a whole batch onto every device before it transforms it, however
the batch is sharded. `custom_partitioning` tells XLA that the leading axes are independent, but can neither be
differentiated nor batched. So both transforms are one small linear primitive around it, whose transpose is the other
transform: derivatives of any order and mode cost real transforms only.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Complex, Float


def rfft(x: Float[Array, "*B L"], n: int) -> Complex[Array, "*B F"]:
    """The n // 2 + 1 frequencies of x padded with zeros to length n >= L. Takes float32 and float64."""
    padding = ((0, 0),) * (x.ndim - 1) + ((0, n - x.shape[-1]),)
    return _bind(jnp.pad(x, padding), n=n, inverse=False)


def irfft(spectrum: Complex[Array, "*B F"], n: int) -> Float[Array, "*B N"]:
    """The n real values of which these are the n // 2 + 1 frequencies. Takes complex64 and complex128."""
    return _bind(spectrum, n=n, inverse=True)


def _bind(x, *, n, inverse):
    return _real_fft_p.bind(x, n=n, inverse=inverse, program=_program(x.shape, x.dtype, n, inverse))


def _real_fft(x, n, inverse):
    return jnp.fft.irfft(x, n) if inverse else jnp.fft.rfft(x, n)


def _partition(n, inverse, mesh, arguments, result):
    """Each device transforms the rows it has, and needs these whole: where L is sharded, L alone is gathered."""
    (x,) = arguments
    transform = functools.partial(_real_fft, n=n, inverse=inverse)
    if isinstance(x.sharding, NamedSharding):
        rows = NamedSharding(mesh, PartitionSpec(*x.sharding.spec[: len(x.shape) - 1], None))
        return mesh, transform, rows, (rows,)
    # Under a shard_map over some axes of a mesh only, the shardings over the others come without a mesh to rebuild.
    if x.sharding.shard_shape(x.shape)[-1] != x.shape[-1]:
        raise NotImplementedError("a Fourier transform of a sharded axis inside a partially manual shard_map")
    return mesh, transform, x.sharding, (x.sharding,)


_partitioned_real_fft = custom_partitioning(_real_fft, static_argnums=(1, 2))
_partitioned_real_fft.def_partition(_partition, sharding_rule="... l -> ... f", need_replication_factors=("l", "f"))


# The primitive carries its program as a parameter because JAX gives a lowering rule the devices that
# custom_partitioning needs only if it finds custom_partitioning somewhere in the jaxpr to be lowered.
def _program(shape, dtype, n, inverse):
    return jax.make_jaxpr(lambda x: _partitioned_real_fft(x, n, inverse))(jax.ShapeDtypeStruct(shape, dtype))


_real_fft_p = Primitive("real_fft")
_compiled = jax.jit(_partitioned_real_fft, static_argnums=(1, 2))


@_real_fft_p.def_impl
def _(x, *, n, inverse, **_):
    return _compiled(x, n, inverse)


@_real_fft_p.def_abstract_eval
def _(x, *, program, **_):
    (result,) = program.out_avals
    return x.update(shape=result.shape, dtype=result.dtype)


def _lower(x, *, program, **_):
    return jaxpr_as_fun(program)(x)


mlir.register_lowering(_real_fft_p, mlir.lower_fun(_lower, multiple_results=True))


def _transpose(cotangent, x, *, n, inverse, program):
    """JAX transposes complex maps without conjugation: y = Re(w X) has the transpose ct -> w ct."""
    del x, program
    # The half spectrum stands for both of its halves, except at frequency 0 and, for even n, at n / 2.
    frequency = jnp.arange(n // 2 + 1)
    both = (frequency > 0) & (2 * frequency < n)
    if inverse:
        return [jnp.conj(_bind(cotangent, n=n, inverse=False)) * jnp.where(both, 2 / n, 1 / n).astype(cotangent.dtype)]
    return [_bind(jnp.conj(cotangent) * jnp.where(both, n / 2, n).astype(cotangent.real.dtype), n=n, inverse=True)]


ad.deflinear2(_real_fft_p, _transpose)


def _batch(arguments, axes, *, n, inverse, program):
    del program
    return _bind(jnp.moveaxis(arguments[0], axes[0], 0), n=n, inverse=inverse), 0


batching.primitive_batchers[_real_fft_p] = _batch
