"""Pathfinder images without end: the same ones for the same seed, whatever the number of processes that draw them."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from experiments.common.processes import in_processes
from experiments.lra.pathfinder import snakes, stamps
from experiments.lra.pathfinder.design import ANTIALIAS, Design
from experiments.lra.pathfinder.snakes import Distractors, Paddles
from experiments.lra.pathfinder.stamps import Tables

VERSION = "1.0.0"  # to be raised whenever a seed would give other images than before


class Pace(NamedTuple):
    """For each size, fixed, since the images that a seed gives depend on it.

    Attributes:
      images: of a chunk.
      attempts: at once, at most; their masks fit into the memory of a processor where it is possible.
    """

    images: int
    attempts: int


PACES: Final = {32: Pace(500, 4096), 64: Pace(100, 2048), 128: Pace(100, 1024), 256: Pace(100, 128)}


class Row(NamedTuple):
    """An image, uint8 (size, size), and whether its discs lie on one snake, 0 or 1."""

    image: np.ndarray
    label: int


class Chunk(NamedTuple):
    """Images that were drawn together.

    Attributes:
      images: uint8 (images, size, size).
      labels: int64 (images,), 0 or 1.
      attempts: at target snakes, of those whose first paddle was one that can be placed at all.
      distractors: int64 (images,), how many found a place.
    """

    images: np.ndarray
    labels: np.ndarray
    attempts: int
    distractors: np.ndarray


def rows(seed: int, design: Design, *, stream: int = 0, workers: int = 1) -> Iterator[Row]:
    """Images without end.

    Args:
      seed: at least 0.
      design: of the images.
      stream: of the images of a seed; each split of a dataset has its own.
      workers: processes that draw; with 1 it is this one.

    Raises:
      ValueError: for a seed below 0 or fewer workers than 1.

    >>> row = next(rows(0, Design(32)))
    >>> row.image.shape, row.image.dtype, row.image.max()
    ((32, 32), dtype('uint8'), np.uint8(255))
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0; got {seed}.")
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}.")
    draw = functools.partial(draw_chunk, seed, design, stream)
    chunks = map(draw, itertools.count()) if workers == 1 else in_processes(draw, workers)
    return (Row(image, int(label)) for chunk in chunks for image, label in zip(chunk.images, chunk.labels, strict=True))


def draw_chunk(seed: int, design: Design, stream: int, number: int) -> Chunk:
    """One chunk of a stream of a seed. Chunks are independent of each other, so that any process may draw it."""
    rng = np.random.default_rng([seed, stream, number])
    count, at_once = PACES[design.size]
    labels = rng.integers(0, 2, count)
    # Drawn before the targets, which succeed more often where margins are small.
    margins = rng.choice(design.geometry.margins, count)
    images = np.empty((count, design.size, design.size), np.uint8)
    placed = np.zeros(count, np.int64)
    attempts = 0
    for margin in design.geometry.margins:
        members = np.flatnonzero(margins == margin)
        if len(members) == 0:
            continue
        tables = stamps.tables(design.geometry, margin)
        targets, canvases, tried = snakes.targets(rng, tables, design, len(members), at_once)
        distractors = snakes.distractors(rng, tables, design, canvases)
        for some in distractors:
            placed[members[some.images]] += 1
        marked = rng.integers(0, 2, len(members))
        images[members] = render(tables, design, targets, distractors, labels[members], marked)
        attempts += tried
    return Chunk(images, labels, attempts, placed)


def render(
    tables: Tables,
    design: Design,
    targets: Paddles,
    distractors: list[Distractors],
    labels: np.ndarray,
    marked: np.ndarray,
) -> np.ndarray:
    """Images of snakes, uint8 (images, size, size), brightest 255.

    Discs are at the beginning of the snake that is marked, and at the end of the same one if the label is 1, else of
    the other one.
    """
    count = len(labels)
    shape = (count, tables.width**2)
    lines, others = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    first = np.arange(count) * shape[1]
    for snake, paddle in np.ndindex(targets.places.shape[1:]):
        places = first + targets.places[:, snake, paddle]
        snakes.stamp(lines.reshape(-1), tables.lines, targets.directions[:, snake, paddle], places)
    for images, (directions, places) in distractors:
        for paddle in range(directions.shape[1]):
            where = first[images] + places[:, paddle]
            snakes.stamp(others.reshape(-1), tables.lines, directions[:, paddle], where)
    line_levels, other_levels, disc_levels = (
        np.arange(256) / 255 * contrast
        for contrast in (design.geometry.target_contrast, design.geometry.distractor_contrast, 1.0)
    )
    each = np.arange(count)
    tips = targets.places[each, marked, 0], targets.places[each, np.where(labels == 1, marked, 1 - marked), -1]
    result = np.empty((count, design.size, design.size), np.uint8)
    for image in range(count):
        discs = [disc(design, *divmod(int(tip[image]), tables.width), tables.border) for tip in tips]
        brightness = np.maximum.reduce(
            [
                line_levels[_inner(lines[image], tables)],
                other_levels[_inner(others[image], tables)],
                disc_levels[np.maximum(*discs)],
            ]
        )
        low = brightness.min()
        result[image] = (brightness - low) * (255 / (brightness.max() - low)) + 0.5
    return result


def _inner(canvas: np.ndarray, tables: Tables) -> np.ndarray:
    border = tables.border
    return canvas.reshape(tables.width, tables.width)[border:-border, border:-border]


def disc(design: Design, y: int, x: int, border: int = 0) -> np.ndarray:
    """A marker of the image around a place of a canvas with this border, uint8 (size, size)."""
    return _disc(design.size, design.geometry.marker_radius, y - border, x - border)


@functools.lru_cache(maxsize=4096)
def _disc(size: int, radius: float, y: int, x: int) -> np.ndarray:
    # Lanczos' filter sees three pixels to each side; so a window of a few pixels more gives what the image would.
    window = math.ceil(radius) + 8
    low_y, low_x = max(0, y - window), max(0, x - window)
    high_y, high_x = min(size, y + window), min(size, x + window)
    far_y, far_x = np.ogrid[
        (low_y - y) * ANTIALIAS : (high_y - y) * ANTIALIAS, (low_x - x) * ANTIALIAS : (high_x - x) * ANTIALIAS
    ]
    blown = np.where(far_y**2 + far_x**2 <= (radius * ANTIALIAS) ** 2, 255, 0).astype(np.uint8)
    reduced = Image.fromarray(blown).resize((high_x - low_x, high_y - low_y), Image.Resampling.LANCZOS)
    result = np.zeros((size, size), np.uint8)
    result[low_y:high_y, low_x:high_x] = np.asarray(reduced)
    return result
