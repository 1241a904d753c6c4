"""Real FFTs along the last axis that stay on their device under a sharded jit, and never run two at a time.

`jnp.fft` is not enough, for two reasons. XLA (jax 0.11.2) gathers a whole batch onto every device before it transforms
it, however the batch is sharded: `custom_partitioning` tells XLA that the leading axes are independent, but can neither
be differentiated nor batched. And XLA's CPU runtime (jaxlib 0.11.2) can hang where a program leaves it free to run
several FFTs at once: each waits for a thread of the pool whose threads all wait. Four stacked convolutions on two
cores, the FFTs of their four kernels free to start together, hang within a hundred calls.

So the transforms are one small linear primitive around `custom_partitioning`, of several arrays at once: each device
lays their rows under one another and transforms them in one go, which costs nothing, as the padding has to be written
anyway. Its transpose is the other transform, of the same arrays at once: derivatives of any order and mode cost real
transforms only, and in a stack of layers each FFT waits for the one before, forward and backward. The price: an array
transformed along with another counts as linear with it, so `jax.linear_transpose` wants both; `jax.vjp` need not.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Complex, Float


def rfft(*xs: Float[Array, "..."], n: int) -> tuple[Complex[Array, "..."], ...]:
    """The n // 2 + 1 frequencies of each x, padded with zeros to length n. All float32 or all float64."""
    return tuple(_bind([_pad(x, n) for x in xs], n=n, inverse=False))


def irfft(*spectra: Complex[Array, "..."], n: int) -> tuple[Float[Array, "..."], ...]:
    """The n real values of which each has the n // 2 + 1 frequencies. All complex64 or all complex128."""
    return tuple(_bind(spectra, n=n, inverse=True))


def _pad(x, n):
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, n - x.shape[-1]),))


def _bind(xs, *, n, inverse):
    return _real_fft_p.bind(*xs, n=n, inverse=inverse, program=_program(xs, n, inverse))


def _real_fft(n, inverse, *xs):
    """All rows in one FFT, on one device: whatever mesh is in context, its axes mean nothing here.

    Rows are a matrix, whose only layout has them one after the other. XLA's CPU runtime (jaxlib 0.11.2) refuses others,
    which XLA gave leading axes where it exchanged features between devices.
    """
    transform = jnp.fft.irfft if inverse else jnp.fft.rfft
    with use_abstract_mesh(AbstractMesh((), ())):
        counts = [math.prod(x.shape[:-1]) for x in xs]
        rows = [x.reshape(count, x.shape[-1]) for x, count in zip(xs, counts, strict=True)]
        transformed = transform(jnp.concatenate(rows), n)
        parts = jnp.split(transformed, list(itertools.accumulate(counts))[:-1])
        return tuple(part.reshape(*x.shape[:-1], part.shape[-1]) for part, x in zip(parts, xs, strict=True))


def _partition(n, inverse, mesh, arguments, results):
    """Each device transforms the rows it has, and needs these whole: where L is sharded, L alone is gathered."""
    del results
    shardings = tuple(_sharding_of_rows(mesh, x) for x in arguments)
    return mesh, lambda *xs: _real_fft(n, inverse, *xs), shardings, shardings


def _sharding_of_rows(mesh, x):
    if isinstance(x.sharding, NamedSharding):
        return NamedSharding(mesh, PartitionSpec(*x.sharding.spec[: len(x.shape) - 1], None))
    # Under a shard_map over some axes of a mesh only, the shardings over the others come without a mesh to rebuild.
    if x.sharding.shard_shape(x.shape)[-1] != x.shape[-1]:
        raise NotImplementedError("a Fourier transform of a sharded axis inside a partially manual shard_map")
    return x.sharding


def _sharding_rule(n, inverse, mesh, arguments, results):
    """Such as "a0 a1 l0, b0 l1 -> a0 a1 f0, b0 f1": leading axes are independent, the last ones have to be whole."""
    del n, inverse, mesh, results
    axes = [[f"{chr(97 + i)}{axis}" for axis in range(len(x.shape) - 1)] for i, x in enumerate(arguments)]
    before = ", ".join(" ".join([*names, f"length{i}"]) for i, names in enumerate(axes))
    after = ", ".join(" ".join([*names, f"frequency{i}"]) for i, names in enumerate(axes))
    last = tuple(f"{name}{i}" for name in ("length", "frequency") for i in range(len(axes)))  # in order of appearance
    return f"{before} -> {after}", {"need_replication_factors": last}


_partitioned_real_fft = custom_partitioning(_real_fft, static_argnums=(0, 1))
_partitioned_real_fft.def_partition(_partition, sharding_rule=_sharding_rule)


# The primitive carries its program as a parameter because JAX gives a lowering rule the devices that
# custom_partitioning needs only if it finds custom_partitioning somewhere in the jaxpr to be lowered.
def _program(xs, n, inverse):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
    return jax.make_jaxpr(lambda *xs: _partitioned_real_fft(n, inverse, *xs))(*shapes)


_real_fft_p = Primitive("real_fft")
_real_fft_p.multiple_results = True
_compiled = jax.jit(_partitioned_real_fft, static_argnums=(0, 1))


@_real_fft_p.def_impl
def _(*xs, n, inverse, **_):
    return _compiled(n, inverse, *xs)


@_real_fft_p.def_abstract_eval
def _(*xs, program, **_):
    return [x.update(shape=y.shape, dtype=y.dtype) for x, y in zip(xs, program.out_avals, strict=True)]


def _lower(context, *xs, program, **_):
    # The program was traced without shardings, which its reshapes could not express where they are explicit.
    context = context.replace(avals_in=program.in_avals, avals_out=program.out_avals)
    return mlir.lower_fun(jaxpr_as_fun(program), multiple_results=True)(context, *xs)


mlir.register_lowering(_real_fft_p, _lower)


def _jvp(primals, tangents, *, n, inverse, program):
    results = _real_fft_p.bind(*primals, n=n, inverse=inverse, program=program)
    live = [tangent for tangent in tangents if not isinstance(tangent, ad.Zero)]
    transformed = iter(_bind(live, n=n, inverse=inverse) if live else ())
    return results, [
        ad.Zero(jax.typeof(result).to_tangent_aval()) if isinstance(tangent, ad.Zero) else next(transformed)
        for tangent, result in zip(tangents, results, strict=True)
    ]


ad.primitive_jvps[_real_fft_p] = _jvp


def _transpose(cotangents, *xs, n, inverse, program):
    """JAX transposes complex maps without conjugation: y = Re(w X) has the transpose ct -> w ct."""
    del program
    wanted = [ad.is_undefined_primal(x) for x in xs]
    live = [want and not isinstance(ct, ad.Zero) for want, ct in zip(wanted, cotangents, strict=True)]
    chosen = [ct for ct, use in zip(cotangents, live, strict=True) if use]
    # The half spectrum stands for both of its halves, except at frequency 0 and, for even n, at n / 2.
    frequency = jnp.arange(n // 2 + 1)
    both = (frequency > 0) & (2 * frequency < n)
    if inverse:
        spectra = rfft(*chosen, n=n)
        transposed = tuple(jnp.conj(ct) * jnp.where(both, 2 / n, 1 / n).astype(ct.real.dtype) for ct in spectra)
    else:
        transposed = irfft(*(jnp.conj(ct) * jnp.where(both, n / 2, n).astype(ct.real.dtype) for ct in chosen), n=n)
    results = iter(transposed)
    return [
        next(results) if use else ad.Zero(x.aval) if want else None
        for x, want, use in zip(xs, wanted, live, strict=True)
    ]


ad.primitive_transposes[_real_fft_p] = _transpose


def _batch(xs, axes, *, n, inverse, program):
    """Arrays without the new axis keep to themselves, their transforms too."""
    del program
    moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(xs, axes, strict=True)]
    return _bind(moved, n=n, inverse=inverse), [None if axis is None else 0 for axis in axes]


batching.primitive_batchers[_real_fft_p] = _batch
