"""From examples to batches on the devices: each is a pure function of the seed and of its number, so nothing about the
data has to be saved for a run to go on where it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from experiments.common.task import Batch

READ_THREADS = 2
READ_AHEAD = 4  # batches; each waits in the memory of the devices


class EvaluationBatch(NamedTuple):
    """A batch that may be padded with repeated examples; they weigh nothing."""

    examples: Batch
    weight: Any
    """(B,): 1 for an example, 0 for padding."""


def training_batches(examples: grain.MapDataset, batch_size: int, sharding: NamedSharding) -> grain.MapDataset:
    """Batch number s holds the examples s * batch_size and following. Each process reads its own rows of it alone."""
    return _local_batches(examples.repeat(), batch_size).map(lambda batch: to_devices(batch, sharding))


def evaluation_batches(examples: grain.MapDataset, batch_size: int, sharding: NamedSharding) -> grain.MapDataset:
    """Every example of a split once, in `EvaluationBatch`es of one size: the last one is filled up."""
    last = len(examples) - 1
    padded = -(-len(examples) // batch_size) * batch_size
    numbered = grain.MapDataset.range(padded).map(
        lambda i: EvaluationBatch(examples[min(i, last)], np.float32(i <= last))
    )
    return _local_batches(numbered, batch_size).map(lambda batch: to_devices(batch, sharding))


def _local_batches(examples: grain.MapDataset, batch_size: int) -> grain.MapDataset:
    """This process's rows of each batch: a batch is one block of rows after the other, in the order of processes."""
    blocks = examples.batch(batch_size // jax.process_count())
    return blocks[jax.process_index() :: jax.process_count()]


def to_devices(batch: Any, sharding: NamedSharding) -> Any:
    """The rows of all processes as one batch, sharded over all devices."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


@contextmanager
def reading_ahead(batches: grain.MapDataset) -> Iterator[Iterator[Any]]:
    """The batches in their order, made and sent to the devices by threads while the devices compute."""
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    iterator = iter(batches.to_iter_dataset(options))
    try:
        yield iterator
    finally:
        iterator.close()
