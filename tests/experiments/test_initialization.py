"""Random bits of an initialisation."""

import jax
import pytest

from experiments.common.initialization import quickly_compiled_random_bits


def lowered_for_cuda() -> str:
    draw = jax.jit(lambda key: jax.random.bits(key, (5,)))
    return draw.trace(jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()


def test_a_kernel_draws_them_only_inside():
    assert "cu_threefry2x32" not in lowered_for_cuda()
    with quickly_compiled_random_bits():
        assert "cu_threefry2x32" in lowered_for_cuda()
    assert "cu_threefry2x32" not in lowered_for_cuda()


def test_an_exception_ends_it():
    with pytest.raises(KeyError), quickly_compiled_random_bits():
        raise KeyError
    assert "cu_threefry2x32" not in lowered_for_cuda()
