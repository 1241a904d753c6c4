"""Operations of kernels with learned blocks: each device works on its rows of the batch and on its features.

Blocks are whole everywhere, and their cotangents, sums over batch and features, are added up over the devices.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import config as jax_config  # there is no public way to ask whether kernels are being interpreted
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.fft_conv.api import _axes, _needs_cuda_p
from pallas_kernels.fft_conv.platform import on_cuda

# The kernels shift their loop counter right by this, to a zero that the compiler takes for a variable.
_SHIFT = 31


class Operation:
    """A function of arrays that launches kernels, and how it is divided.

    Attributes:
      fun: of the operands, the kernels' `[31]` after them, and a static configuration.
      operands: the axes of each operand, without `[31]`; the first has b, the batch, and d, the features, which alone
        are divided.
      results: the axes of each result.
      sums: whether a result that lacks b or d is a sum over it, and not the same on all devices.
    """

    def __init__(self, fun: Callable[..., Any], operands: Sequence[str], results: Sequence[str], *, sums: bool = False):
        self.fun = fun
        self.operands, self.results, self.sums = tuple(operands), tuple(results), sums
        self.divided = custom_partitioning(fun, static_argnums=(len(self.operands) + 1,))
        rule = f"{', '.join((*self.operands, 'shift'))} -> {', '.join(self.results)}"
        axes = dict.fromkeys(re.findall(r"\w+", rule))  # JAX wants them in the order of appearance
        whole = tuple(axis for axis in axes if axis not in ("b", "d"))
        self.divided.def_partition(self._partition, sharding_rule=rule, need_replication_factors=whole)

    def specs_of_results(self, b, d) -> tuple[P, ...]:
        """How they lie on a mesh where batch and features are divided over its axes b and d."""
        return tuple(_spec(axes, b, d) for axes in self.results)

    def _partition(self, config, mesh, arguments, results):
        b, d = _axes(arguments)

        def run(*operands):
            parts = list(self.fun(*operands, config))
            lacking = [_lacking(axes, b, d) if self.sums else () for axes in self.results]
            for over in dict.fromkeys(filter(None, lacking)):
                places = [place for place, axes in enumerate(lacking) if axes == over]
                for place, total in zip(places, jax.lax.psum([parts[place] for place in places], over), strict=True):
                    parts[place] = total
            return tuple(parts)

        def shardings(specs):
            return tuple(NamedSharding(mesh, spec) for spec in specs)

        of_operands = *(_spec(axes, b, d) for axes in self.operands), P()
        return mesh, run, shardings(self.specs_of_results(b, d)), shardings(of_operands)


def _spec(axes: str, b, d) -> P:
    divided = {"b": b, "d": d}
    names = [divided.get(axis) for axis in axes.split()]
    while names and names[-1] is None:
        names.pop()
    return P(*names)


def _lacking(axes: str, b, d) -> tuple:
    """Of the mesh, over which an array is not divided though batch or features are."""
    return tuple(name for axis, names in (("b", b), ("d", d)) if axis not in axes.split() for name in names or ())


def on_gpu(operation: Operation, config, *operands: jax.Array) -> Any:
    """Runs where it is lowered for CUDA, each shard on its device; or in the interpreter, which knows no shards.

    Args:
      operation: of these operands.
      config: hashable.
      operands: no constants, which custom_partitioning refuses.
    """
    operands = *operands, jnp.array([_SHIFT], jnp.int32)
    if jax_config.pallas_tpu_interpret_mode_context_manager.value is not None:
        return operation.fun(*operands, config)

    def refuse(result, *operands):
        return _needs_cuda_p.bind(*operands, shape=result.shape, dtype=result.dtype, instead="butterfly")

    run = functools.partial(on_cuda, lambda *x: operation.divided(*x, config), refuse)
    by_platform = sequential_vmap(run)
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return by_platform(*operands)
    # Pallas indexes no arrays whose sharding is part of their type.
    out_sharding = operation.specs_of_results(*_axes([jax.typeof(operands[0])]))
    return jax.sharding.auto_axes(by_platform, out_sharding=out_sharding)(*operands)
