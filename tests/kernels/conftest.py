"""Mosaic lowers kernels in half of its time."""

import pytest

from tests.kernels.numbering import numbered_once


@pytest.fixture(scope="session", autouse=True)
def _quick_lowering():
    with numbered_once():
        yield
