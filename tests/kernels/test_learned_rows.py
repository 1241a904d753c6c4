"""The schedule of the kernels of learned rows: every row of every sequence once, whatever divides what."""

import collections
import re

import pytest
from jax import lax

from pallas_kernels.fft_conv.learned_rows import Schedule, Shapes


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("batch", "features", "rows", "blocks"),
    [(2, 3, 4, 4), (5, 1, 4, 13), (7, 2, 5, 132), (1, 1, 3, 3), (4, 7, 2, 9), (1, 40, 4, 132)],
)
def test_every_row_is_worked_on_once(monkeypatch, batch, features, rows, blocks, workers):
    schedule = Schedule(Shapes(batch, features, rows, "bfloat16", blocks), workers)
    done, block = collections.Counter(), 0
    monkeypatch.setattr(lax, "axis_index", lambda name: block)
    monkeypatch.setattr(lax, "rem", lambda a, b: a % b)
    assert schedule.grid <= blocks
    for block in range(schedule.grid):  # noqa: B007
        for step in range(schedule.steps + 1):
            for worker in range(workers):
                feature, sequence, work = schedule.at(step, worker)
                if work:
                    assert schedule.item(step // schedule.rounds) < schedule.items
                    done[schedule.k0, feature, sequence] += 1
    assert dict(done) == {(k, d, b): 1 for k in range(rows) for d in range(features) for b in range(batch)}


def test_blocks_share_a_batch_where_that_makes_fewer_steps():
    def splits(features, workers=1):
        schedule = Schedule(Shapes(16, features, 4, "bfloat16"), workers)
        return schedule.splits, schedule.steps

    assert splits(768) == (1, 24 * 16)  # 33 blocks for each row
    assert splits(33) == (1, 16)
    assert splits(20) == (8, 5 * 2)
    assert splits(1) == (16, 1)
    assert splits(1, workers=3) == (6, 1)


def test_more_rows_than_blocks_are_refused():
    with pytest.raises(ValueError, match=re.escape("rows must be from 1 to the 4 blocks; got 5.")):
        Shapes(1, 1, 5, "bfloat16", 4)
