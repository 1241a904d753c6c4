"""Kernels that a process lowers once, however many layers, devices and programs call them.

Mosaic infers the layouts of a kernel's values as it lowers it, and takes from half a second to half a minute for each.
JAX does it again for every program, and under a sharded jit for every call, since the partitioner asks for each in a
program of its own; and it numbers what comes out, which so is another kernel to the compiler every time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax._src import config as jax_config  # there is no public way to ask whether kernels are being interpreted
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.extend.mlir import ir
from jax.interpreters import mlir

_KEPT = 64
"""Lowered kernels, of up to a few megabytes each; a model at one length has a dozen."""


def lowered_once(make: Callable[..., Callable[..., Any]], *arguments: Any) -> Callable[..., Any]:
    """The kernel ``make(*arguments)``, lowered once for all equal arguments and types of operands.

    It runs on CUDA alone, unless it is interpreted, and has neither derivatives nor batches.

    Args:
      make: gives the same kernel for the same arguments, a function of arrays that is one launch.
      arguments: hashable.

    Raises:
      ValueError: when called, if there is more to the function than one launch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax.experimental.pallas.mosaic_gpu as plgpu
      >>> def copy(rows):
      ...     def copy_kernel(x, y):
      ...         y[...] = x[...]
      ...     return plgpu.kernel(copy_kernel, out_type=jax.ShapeDtypeStruct((rows, 128), "float32"))
      >>> def model(x):
      ...     return lowered_once(copy, 64)(lowered_once(copy, 64)(x))
      >>> traced = jax.jit(model).trace(jnp.ones((64, 128)))
      >>> traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")
      1
    """
    return traced_once(_launch_of, make, *arguments)


def traced_once(make: Callable[..., Callable[..., Any]], *arguments: Any) -> Callable[..., Any]:
    """The function ``make(*arguments)`` likewise, of which a program has one for all of its layers: any function."""
    return functools.partial(_make_and_call, make, arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_and_call(make, arguments, *operands):
    return make(*arguments)(*operands)


def _launch_of(make, *arguments):
    kernel = make(*arguments)

    def launch(*operands):
        if jax_config.pallas_tpu_interpret_mode_context_manager.value is not None:
            return kernel(*operands)
        jaxpr, results = jax.make_jaxpr(kernel, return_shape=True)(*operands)
        if not _is_one_launch(jaxpr.jaxpr):
            found = ", ".join(eqn.primitive.name for eqn in jaxpr.eqns)
            raise ValueError(f"make must give one launch of its operands, whose results it returns; got {found}.")
        key = make, arguments, jax.config.jax_enable_x64
        flat = _kernel_p.bind(*jax.tree.leaves(operands), jaxpr=jaxpr, key=key)
        return jax.tree.unflatten(jax.tree.structure(results), flat)

    return launch


def _is_one_launch(jaxpr) -> bool:
    """Else what a kernel is kept as, a call without what comes before and after it, would not be the function."""
    if len(jaxpr.eqns) != 1:
        return False
    (launch,) = jaxpr.eqns
    return [*launch.invars] == [*jaxpr.invars] and [*launch.outvars] == [*jaxpr.outvars] and not jaxpr.constvars


_kernel_p = Primitive("fft_conv_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_abstract_eval
def _(*operands, jaxpr: ClosedJaxpr, key):
    return jaxpr.out_avals


def _lower(ctx, *operands, jaxpr: ClosedJaxpr, key):
    types = tuple((aval.shape, aval.dtype) for aval in ctx.avals_in)
    kept = _kept(key, types, ctx.is_forward_compat())
    if not kept:
        results = mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)
        call = ir.OpResult(results[0]).owner
        assert call.name == _CUSTOM_CALL
        assert list(call.operands) == list(operands)
        attributes = {name: str(attribute) for name, attribute in call.attributes.items()}
        kept.append(_Call([str(result.type) for result in results], attributes))
        return results
    known = kept[0]
    return ir.Operation.create(
        _CUSTOM_CALL,
        results=[ir.Type.parse(text) for text in known.results],
        operands=operands,
        attributes={name: ir.Attribute.parse(text) for name, text in known.attributes.items()},
    ).results


_CUSTOM_CALL = "stablehlo.custom_call"
mlir.register_lowering(_kernel_p, _lower, platform="cuda")


class _Call(NamedTuple):
    """What a kernel has become but for its operands, as text, for each program has objects of its own."""

    results: list[str]
    attributes: dict[str, str]


@functools.lru_cache(maxsize=_KEPT)
def _kept(key, types, forward_compatible: bool) -> list[_Call]:
    """Place for the one of a kernel, empty until it is lowered first."""
    return []
