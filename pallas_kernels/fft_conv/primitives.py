"""Operations of one's own inside a kernel, of registers as they are."""

from collections.abc import Callable

import jax
import jax.experimental.mosaic.gpu as mgpu

# There is no public way to lower a primitive of one's own in a kernel.
from jax._src.pallas.mosaic_gpu import lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir


def primitive(name: str, meaning: Callable, on_gpu: Callable) -> Primitive:
    """An ordinary function anywhere but in a kernel on a GPU: the interpreter does not take inlined code."""
    new = Primitive(name)
    new.def_impl(meaning)

    def abstract(x, *rest, **static):
        result = jax.eval_shape(lambda *x: meaning(*x, **static), x, *rest)
        return x.update(shape=result.shape, dtype=result.dtype, weak_type=False)

    new.def_abstract_eval(abstract)
    mlir.register_lowering(new, mlir.lower_fun(meaning, multiple_results=False))
    for semantics in (mgpu.LoweringSemantics.Lane, mgpu.LoweringSemantics.Warpgroup):
        lowering.register_lowering_rule(new, semantics)(lowering._lower_fun(on_gpu))
    return new
