"""Samples and training examples of the reviews of Text and the papers of Retrieval, for `registry`."""

from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.common.splits import Source
from experiments.data.samples import Texts
from experiments.lra.retrieval import recipe as retrieval_recipe
from experiments.lra.retrieval import released
from experiments.lra.retrieval import stand_in as papers
from experiments.lra.text import archive, dataset, vocabulary
from experiments.lra.text import stand_in as reviews_made_up

_LONGEST = 4095  # characters of what is made up


def text(data_dir: Path | None, count: int, seed: int) -> Texts:
    """Random training reviews, or made-up ones."""
    if data_dir is None:
        found = reviews_made_up.reviews(count, seed, "train", _LONGEST)
        source = "made up by a grammar; give --data-dir for reviews of IMDB"
    else:
        rows = dataset.read(dataset.prepare(data_dir, Console(stderr=True))).train
        found = [rows[row] for row in _chosen(len(rows), count, seed)]
        source = f"IMDB in {data_dir}, training"
    return Texts(source, [archive.LABELS[review.label] for review in found], [_readable(one.text) for one in found])


def retrieval(data_dir: Path | None, count: int, seed: int) -> Texts:
    """Random training pairs, or made-up ones: of each the beginnings of both papers."""
    if data_dir is None:
        found = papers.pairs(count, seed, "train", _LONGEST)
        source = "made up by a grammar; give --data-dir for papers of AAN"
    else:
        rows = released.read(data_dir)[0]
        found = [rows[row] for row in _chosen(len(rows), count, seed)]
        source = f"AAN in {data_dir}, training"
    texts = [" ‖ ".join(_readable(one)[:240] for one in pair.texts) for pair in found]
    return Texts(source, ["related" if pair.label else "unrelated" for pair in found], texts)


def text_source(data_dir: Path | None, rows: int) -> Source:
    """Made-up reviews, as bytes; the real ones are read from array records in addition."""
    made_up = reviews_made_up.reviews(rows, 0, "train", _LONGEST)
    return dataset.Examples(made_up, vocabulary.Bytes(), _LONGEST + 1)


def retrieval_source(data_dir: Path | None, rows: int) -> Source:
    """Made-up pairs, as characters; the real ones are read from a mapped file in addition."""
    length = retrieval_recipe.PAPER.max_length
    made_up = papers.pairs(rows, 0, "train", length - 1)
    return retrieval_recipe.Examples(made_up, retrieval_recipe.TOKENS[retrieval_recipe.PAPER.units], length)


def _chosen(rows: int, count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(rows)[:count].tolist()


def _readable(text: bytes) -> str:
    return text.decode(errors="replace")
