"""Samples and training examples of ListOps, CIFAR-10 and Pathfinder, for `registry`."""

import functools
import itertools
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.common.splits import Source
from experiments.data.samples import Pictures, Texts
from experiments.images.cifar import dataset as cifar_dataset
from experiments.images.cifar import published, stand_in
from experiments.images.cifar.dataset import Form
from experiments.lra.listops import dataset as listops_dataset
from experiments.lra.listops import trees, vocabulary
from experiments.lra.pathfinder import dataset as pathfinder_dataset
from experiments.lra.pathfinder import images
from experiments.lra.pathfinder.dataset import Generated
from experiments.lra.pathfinder.design import Design


def listops(data_dir: Path | None, count: int, seed: int) -> Texts:
    """Drawn; a folder makes no difference, since it would hold the same."""
    rows = list(itertools.islice(trees.rows(seed, trees.Shape()), count))
    texts = [" ".join(vocabulary.TEXTS[token] for token in row.tokens) for row in rows]
    return Texts(f"generated, seed {seed}", [f"{row.value}" for row in rows], texts)


def cifar(data_dir: Path | None, count: int, seed: int) -> Pictures:
    """Random training images, or stripes."""
    if data_dir is None:
        found = stand_in.draw(count, seed)
        labels = [f"class {label}" for label in found.labels]
        return Pictures("made-up stripes; give --data-dir for photographs", labels, found.pixels)
    found = published.read(data_dir, console=Console(stderr=True))[0]
    chosen = np.random.default_rng(seed).permutation(len(found.labels))[:count]
    labels = [published.CLASSES[label] for label in found.labels[chosen]]
    return Pictures(f"CIFAR-10 in {data_dir}, training", labels, found.pixels[chosen])


def image(data_dir: Path | None, count: int, seed: int) -> Pictures:
    """The same in gray."""
    coloured = cifar(data_dir, count, seed)
    return Pictures(coloured.source, coloured.labels, cifar_dataset.gray(coloured.images))


def _pathfinder(size: int, data_dir: Path | None, count: int, seed: int) -> Pictures:
    """Drawn; a folder makes no difference, since it would hold the same."""
    rows = list(itertools.islice(images.rows(seed, Design(size)), count))
    labels = ["1: on one curve" if row.label else "0: on two curves" for row in rows]
    return Pictures(f"generated, seed {seed}", labels, np.array([row.image for row in rows]))


pathfinder32 = functools.partial(_pathfinder, 32)
pathx = functools.partial(_pathfinder, 128)
path256 = functools.partial(_pathfinder, 256)


def listops_source(data_dir: Path | None, rows: int) -> Source:
    """In memory, as in training."""
    which = listops_dataset.Generated(train_rows=rows, validation_rows=1, test_rows=1)
    return listops_dataset.drawn(which, 2048).train


def _cifar_source(form: Form, data_dir: Path | None, rows: int) -> Source:
    """In memory, as in training; what the images show makes no difference."""
    return cifar_dataset.formed(form, stand_in.draw(rows, 0))


image_source = functools.partial(_cifar_source, "gray")
scifar_source = functools.partial(_cifar_source, "rgb")
cifar2d_source = functools.partial(_cifar_source, "grid")


def _pathfinder_source(size: int, data_dir: Path | None, rows: int) -> Source:
    """From array records where the whole set would be too large for memory, as in training."""
    which = Generated(Design(size), train_rows=rows, validation_rows=1, test_rows=1)
    whole = Generated(Design(size))
    if data_dir is None or sum(whole.rows) * size**2 <= pathfinder_dataset.IN_MEMORY:
        return pathfinder_dataset.drawn(which).train
    pathfinder_dataset.prepare(data_dir, which)
    return pathfinder_dataset.records(data_dir, size, which.name).train


pathfinder32_source = functools.partial(_pathfinder_source, 32)
pathx_source = functools.partial(_pathfinder_source, 128)
path256_source = functools.partial(_pathfinder_source, 256)
