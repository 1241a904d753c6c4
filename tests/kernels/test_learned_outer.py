"""The kernel of the outer blocks' cotangents: sums and joined rows against float64, interpreted, and planted errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import learned_outer_sm90 as kernels
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE
from pallas_kernels.fft_conv.learned_outer_sm90 import Shapes
from tests.kernels.barriers import Trace
from tests.kernels.interpreter import interpreted
from tests.kernels.parity_table import relative_error
from tests.tolerances import FUSED

SUMS = 1e-6
"""Of the sums, whose factors are exact: 1.6e-7 measured."""


def operands(shapes, matrix_rows):
    """z, x and a matrix that has fewer rows than one of x."""
    random = np.random.default_rng(0)
    z, x = (
        jnp.asarray(random.standard_normal((shapes.sequences * rows, N1, TILE)), shapes.dtype)
        for rows in (shapes.rows_of_z, shapes.rows_of_x)
    )
    return z, x, jnp.asarray(random.standard_normal((matrix_rows, shapes.rows_of_z)), shapes.dtype)


def run(shapes, z, x, matrix):
    """The cotangent, and the joined rows if there are any."""

    @jax.jit
    def both(z, x, matrix):
        sums, *y = kernels.product(shapes)(z, x, *([shapes.stacked(matrix)] if shapes.joins else []))
        return shapes.cotangent(sums), *y

    with interpreted():
        return jax.tree.map(np.asarray, both(z, x, matrix))


def errors(shapes):
    z, x, matrix = operands(shapes, shapes.rows_of_x - 1)
    cotangent, *joined = run(shapes, z, x, matrix)
    z, x, matrix = (np.asarray(y, np.float64) for y in (z, x, matrix))
    z, x = (y.reshape(shapes.sequences, -1, BLOCK) for y in (z, x))
    found = [relative_error(cotangent, np.einsum("sin,sjn->ij", z, x))]
    for y in joined:
        want = np.einsum("ji,sin->sjn", np.pad(matrix, ((0, 1), (0, 0))), z)
        found.append(relative_error(y.reshape(want.shape), want))
    return found


CASES = {
    # sixteen for one, of which there are four
    "2 rows": Shapes(4, 4, 2, jnp.dtype("float16"), True, blocks=1),
    # eight sequences for one
    "3 rows": Shapes(8, 8, 3, jnp.dtype("bfloat16"), True, blocks=1),
    # three sequences by twos: the last has no other; two blocks, and steps without work
    "16 rows": Shapes(3, 32, 16, jnp.dtype("float16"), True, blocks=2),
    # a tile and a part of another, whose other rows no copy writes: they must be zero, and are none in the interpreter
    "40 rows": Shapes(1, 80, 40, jnp.dtype("float16"), True, blocks=1),
    "40 rows, sums alone": Shapes(1, 80, 40, jnp.dtype("float16"), blocks=1),
    # three tiles, of three warpgroups, the last in part
    "68 rows": Shapes(1, 136, 72, jnp.dtype("bfloat16"), blocks=1),
}


@pytest.mark.parametrize("name", ["3 rows", *(pytest.param(n, marks=pytest.mark.slow) for n in [*CASES][1:])])
def test_sums_and_joined_rows(name):
    sums, *joined = errors(CASES[name])
    assert sums < SUMS, sums
    assert all(error < FUSED[CASES[name].dtype.name] for error in joined), joined  # 1.7e-3 and 2.1e-4


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
def test_threads_share_nothing_without_a_barrier_and_every_commit_is_needed(shapes):
    z, x, matrix = operands(shapes, shapes.rows_of_x)
    trace = Trace.of(kernels.product(shapes), (z, x, *([shapes.stacked(matrix)] if shapes.joins else [])))
    assert not trace.faults()
    assert all(trace.faults(without=commit) for commit in trace.commits)


def _forgets(totals, *sums, right=kernels.add_products):
    return right([jnp.zeros_like(total) for total in totals], *sums)


def _counts_all(shapes, sums):
    """What sequences that were taken together give with each other, too."""
    whole = sums.sum(0)[: shapes.rows].reshape(shapes.together, shapes.rows_of_z, shapes.together, shapes.rows_of_x)
    return whole.sum((0, 2))


PLANTED = {"add_products": (kernels, _forgets), "cotangent": (Shapes, _counts_all)}


@pytest.mark.parametrize("name", [pytest.param("add_products", marks=pytest.mark.slow), "cotangent"])
def test_an_error_in_any_step_shows(name, monkeypatch):
    where, wrong = PLANTED[name]
    monkeypatch.setattr(where, name, wrong)
    sums, *_ = errors(CASES["3 rows"])
    assert sums > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 12, 8), "fill tiles of eight"),
        ((3, 8, 4), "fill tiles of eight"),
        ((2, 264, 128), "fit a product of 256 x 128"),
        ((1, 136, 72), "joins at most 128 rows"),
    ],
)
def test_refuses_rows_that_it_has_no_product_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shapes(*arguments, jnp.dtype("float16"), joins=True)
