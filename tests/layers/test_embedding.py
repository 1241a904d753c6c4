import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax.models.embedding import LARGEST_AS_PRODUCT, embed


@pytest.mark.parametrize("size", [1, 18, LARGEST_AS_PRODUCT, LARGEST_AS_PRODUCT + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_the_sum_over_the_places_of_a_token(size, dtype):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, size, (3, 40)))
    table = jnp.asarray(rng.standard_normal((size, 5)), dtype)
    g = jnp.asarray(rng.standard_normal((3, 40, 5)), dtype)
    y, pull_back = jax.vjp(lambda table: embed(table, tokens), table)
    np.testing.assert_array_equal(y, table[tokens])
    want = np.zeros((size, 5))
    np.add.at(want, tokens.ravel(), np.asarray(g, np.float64).reshape(-1, 5))
    (got,) = pull_back(g)
    # In bfloat16 a sum is rounded once, by a scatter after each addition.
    scatters = size > LARGEST_AS_PRODUCT
    rtol, atol = {"float32": (1e-6, 4e-6), "bfloat16": (2**-8, 5e-2 if scatters else 1e-6)}[dtype]
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=rtol, atol=atol)
    assert (got.dtype, got.shape) == (table.dtype, table.shape)


def test_a_small_table_needs_no_scatter():
    table, tokens = jnp.ones((18, 4)), jnp.zeros((2, 7), int)
    text = jax.jit(jax.grad(lambda table: embed(table, tokens).sum())).lower(table).as_text()
    assert "scatter" not in text
    assert "dot_general" in text


def test_a_token_that_is_not_in_the_table_shows():
    assert np.isnan(embed(jnp.ones((3, 2)), jnp.array([3]))).all()
