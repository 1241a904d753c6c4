"""Mosaic sorts what it infers layouts of by the names of operations, for each of which MLIR numbers the whole kernel.

Here it numbers it once. Of those that the fast tests lower, "inner backward" takes 6.0 s of a core instead of 16.6 and
"forward, 2 blocks" 7.4 s instead of 13.1; what they are lowered to is the same, byte for byte (jax 0.11.2).
"""

import contextlib
import io
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import jax
from jax.experimental.mosaic.gpu import constraints, layout_inference
from jaxlib.mlir import ir

TESTED_VERSIONS = ((0, 11),)  # of JAX: what is replaced here is private to it

_Site = layout_inference.ValueSite
name_of_site = _Site.__str__
_equal_variables = constraints.compute_transitively_equal_vars


@contextlib.contextmanager
def numbered_once() -> Iterator[None]:
    """Makes the names cheap where Mosaic sorts by them; other versions of JAX are left as they are."""
    if jax.__version_info__[:2] not in TESTED_VERSIONS:
        yield
        return
    with (
        mock.patch.object(constraints, "compute_transitively_equal_vars", _sorted_by_numbers),
        mock.patch.object(_Site, "__str__", quick_name),
    ):
        yield


class _Sorting(threading.local):
    """Whether this thread's Mosaic sorts, and if so the numbers, once they were asked for, of what stays as it is."""

    now = False
    numbers: ir.AsmState | None = None


_sorting = _Sorting()


def _sorted_by_numbers(system):
    _sorting.now = True
    try:
        return _equal_variables(system)
    finally:
        _sorting.now, _sorting.numbers = False, None


def quick_name(site) -> str:
    """`name_of_site`, which begins a site's name with how its operation prints."""
    if not _sorting.now:
        return name_of_site(site)
    operation = site.operation.operation
    if _sorting.numbers is None:
        kernel = operation
        while kernel.parent is not None:
            kernel = kernel.parent.operation
        _sorting.numbers = ir.AsmState(kernel)
    text = io.StringIO()
    operation.print(_sorting.numbers, text)
    return name_of_site(SimpleNamespace(operation=text.getvalue(), type=site.type, index=site.index))
