"""Everything about one paddle that can be known before it is placed.

A paddle has one of 360 directions if it begins a snake, and else one of the few dozen that lead from a pixel to the
pixels of a circle around it. So its picture, the neighbourhood that it keeps free, and where the next one may go are
tables, made once; drawing an image is looking them up. Points are y and x in the image; places are numbers of pixels,
row by row, of a canvas with a border wide enough that nothing has to be clipped.

The rules and their oddities are those of the published program (drewlinsley/pathfinder, commit ab9c130, `snakes.py` and
`snakes2.py`), with the picture functions of the SciPy of its time. Angles are measured from x to y, y pointing down.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from experiments.lra.pathfinder.design import ANTIALIAS, Geometry

SEED_DIRECTIONS: Final = 360
OCCUPIED: Final = 77  # of 255: more than 0.3
CLASH: Final = 459  # the sum of two masks: 1.8


class Pixels(NamedTuple):
    """For each direction, some pixels around a place. Rows are filled up by repetition of their first pixel.

    Attributes:
      offsets: int64 (directions, pixels), to be added to a place.
      values: uint8 (directions, pixels).
    """

    offsets: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Tables:
    """For one geometry and margin. The first 360 directions are those of seeds, the others those of candidates.

    Attributes:
      width: of the canvas, border included.
      border: of the canvas.
      ring: uint8 (width²,), the mask before the first paddle: 255 where none may lie.
      ring_dilated: likewise, dilated by the margin, and 255 outside of the image.
      inside: bool (width²,), the pixels of the image.
      outermost: bool (width²,), those of them at its border.
      lines: what a paddle draws.
      masks: the paddle with its margin, where that is more than 0.3; less makes no difference.
      cores: where it may clash, with the values of the mask from which it does.
      dilated: the mask dilated by the margin.
      pivot_steps: float64 (directions, 2), from the pivot of a paddle to that of the next one, see `step`.
      candidates: int64 (directions, candidates), from a pivot to the places where the next paddle may end.
      candidate_numbers: int64, likewise, the direction of each.
      weights: float32, likewise, of each in the lottery; 0 fills rows up.
      head_steps: float64 (360, 2), from the tail of a seed to its head.
      back_steps: float64 (360, 2), from the head of a seed to its pivot.
      footprints: int64 (360, pixels), from a tail to the pixels that must be free for a seed.
      live: bool (360,), the directions that the published program can place at all.
      first_directions: int64 (choices,), those of the first seed of an image; all are equally likely.
      first_tails: int64 (choices, 2, 2), for each of them the lowest y and x of a tail and how many there are of each.
    """

    width: int
    border: int
    ring: np.ndarray
    ring_dilated: np.ndarray
    inside: np.ndarray
    outermost: np.ndarray
    lines: Pixels
    masks: Pixels
    cores: Pixels
    dilated: Pixels
    pivot_steps: np.ndarray
    candidates: np.ndarray
    candidate_numbers: np.ndarray
    weights: np.ndarray
    head_steps: np.ndarray
    back_steps: np.ndarray
    footprints: np.ndarray
    live: np.ndarray
    first_directions: np.ndarray
    first_tails: np.ndarray


@functools.lru_cache(maxsize=8)
def tables(geometry: Geometry, margin: int) -> Tables:
    """Made in a fraction of a second."""
    size, length = geometry.size, geometry.length
    border = geometry.reach + 2 * margin + 3
    width = size + 2 * border
    seeds = np.arange(-180, 180) * np.pi / 180
    displacements, angles = _circle(length + margin)
    directions = np.concatenate([seeds, angles])
    # A seed is drawn from its tail forwards, any other paddle from its head backwards.
    lines, masks = pictures(geometry, margin, np.concatenate([seeds, _reversed(angles)]))
    dilated = dilate(masks, margin)
    weights = _weights(directions, angles, geometry.continuity)
    candidates, candidate_numbers, weights = _likely(displacements @ (width, 1), weights)
    ring, ring_dilated = _rings(geometry, margin, border)
    footprints, live = _footprints(masks[:SEED_DIRECTIONS], geometry, margin)
    first_tails = np.array([_first_tails(offsets, geometry) for offsets in footprints])
    possible = live & (first_tails[:, 1] > 0).all(axis=1)
    return Tables(
        width=width,
        border=border,
        ring=ring,
        ring_dilated=ring_dilated,
        inside=_square(size, border),
        outermost=_square(size, border) & ~_square(size - 2, border + 1),
        lines=_pixels(lines, width, lines > 0),
        masks=_pixels(masks, width, masks >= OCCUPIED),
        cores=_pixels(CLASH - masks.astype(int), width, masks >= CLASH - 255),
        dilated=_pixels(dilated, width, dilated > 0),
        pivot_steps=_towards(directions, length + 2 * margin),
        candidates=candidates,
        candidate_numbers=candidate_numbers + SEED_DIRECTIONS,
        weights=weights,
        head_steps=_towards(seeds, length),
        back_steps=_towards(_reversed(seeds), length + margin),
        footprints=_filled([offsets @ (width, 1) for offsets in footprints]),
        live=live,
        first_directions=np.flatnonzero(possible),
        first_tails=first_tails[possible],
    )


def step(points: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Points (..., 2) moved, and rounded up.

    The sum is rounded and not the step: whether 11 sin π, which is not quite zero, moves a point by a pixel depends on
    how large its coordinate is.
    """
    return np.ceil(points + steps).astype(np.int64)


def _towards(angles: np.ndarray, distance: float) -> np.ndarray:
    """In y and x, (angles, 2)."""
    return distance * np.stack([np.sin(angles), np.cos(angles)], axis=-1)


def _reversed(angles: np.ndarray) -> np.ndarray:
    return np.where(angles < 0, angles + np.pi, angles - np.pi)


def _circle(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of a circle, (pixels, 2) in y and x, and their angles."""
    angles = np.arange(0, 360, 360 / (2 * radius * np.pi)) * np.pi / 180
    pixels = np.unique(np.floor(_towards(angles, radius)).astype(int), axis=0)
    return pixels, np.arctan2(pixels[:, 0], pixels[:, 1])


def _weights(directions: np.ndarray, angles: np.ndarray, continuity: float) -> np.ndarray:
    """cos² of the turn times the continuity, (directions, candidates); from 90° on it is zero."""
    turn = np.abs(angles - directions[:, None])
    turn = continuity * np.minimum(turn, 2 * np.pi - turn)
    return np.where(turn < np.pi / 2, np.cos(turn) ** 2, 0)


def _likely(displacements: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each direction, the candidates that have any weight: displacements, numbers and weights."""
    most = int((weights > 0).sum(axis=1).max())
    numbers = np.sort(np.argsort(weights == 0, axis=1, kind="stable")[:, :most], axis=1)
    return displacements[numbers], numbers, np.take_along_axis(weights, numbers, axis=1).astype(np.float32)


def pictures(geometry: Geometry, margin: int, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paddles that begin in the middle of a square: the lines and their masks, uint8 (angles, side, side)."""
    middle = (geometry.reach + margin) * ANTIALIAS
    blown = []
    for angle in angles:
        picture = Image.new("F", (2 * middle + 1, 2 * middle + 1), "black")
        y, x = step(np.array([middle, middle]), _towards(angle, geometry.length * ANTIALIAS)).tolist()
        width = round(geometry.thickness * ANTIALIAS)
        ImageDraw.Draw(picture).line([(middle, middle), (x, y)], fill="white", width=width)
        blown.append(np.asarray(picture).astype(np.uint8))
    lines = np.array(blown)
    side = 2 * (geometry.reach + margin) + 1
    return reduced(lines, side), reduced(dilate(lines, margin * ANTIALIAS, grow=False), side)


def reduced(images: np.ndarray, side: int) -> np.ndarray:
    """Square uint8 images made smaller, by Lanczos' filter."""
    return np.array([Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS) for image in images])


def dilate(images: np.ndarray, radius: int, *, grow: bool = True) -> np.ndarray:
    """The maximum over a disc around each pixel, in images that become larger by it on every side, or do not."""
    count, side, _ = images.shape
    result = np.zeros((count, side + 2 * radius, side + 2 * radius), images.dtype)
    for y, x in itertools.product(range(-radius, radius + 1), repeat=2):
        if y * y + x * x <= radius * radius:
            window = result[:, radius + y : radius + y + side, radius + x : radius + x + side]
            np.maximum(window, images, out=window)
    return result if grow else result[:, radius : radius + side, radius : radius + side]


def _pixels(images: np.ndarray, width: int, chosen: np.ndarray) -> Pixels:
    """The chosen pixels of square pictures, around their middles."""
    middle = images.shape[1] // 2
    offsets, values = [], []
    for image, mask in zip(images, chosen, strict=True):
        y, x = np.nonzero(mask)
        offsets.append((y - middle) * width + x - middle)
        values.append(image[y, x])
    return Pixels(_filled(offsets), _filled(values).astype(np.uint8))


def _filled(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, filled up by the first element: a pixel is then set to one value only."""
    longest = max(map(len, rows))
    return np.array([np.concatenate([row, np.repeat(row[:1], longest - len(row))]) for row in rows])


def _rings(geometry: Geometry, margin: int, border: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocked border of the image, and the same dilated, on a canvas."""
    ring = np.pad(
        np.zeros((geometry.size - 2 * geometry.padding,) * 2, np.uint8), geometry.padding, constant_values=255
    )
    dilated = dilate(ring[None], margin, grow=False)[0]
    return np.pad(ring, border).ravel(), np.pad(dilated, border, constant_values=255).ravel()


def _square(side: int, border: int) -> np.ndarray:
    """Whether a pixel of the canvas is in the square."""
    return np.pad(np.ones((side, side), bool), border).ravel()


def _footprints(masks: np.ndarray, geometry: Geometry, margin: int) -> tuple[list[np.ndarray], np.ndarray]:
    """For each direction, the pixels (n, 2) that must be free for a seed, and whether the program ever places one.

    They are those where the mask is whole, moved by one pixel down and to the right, as by the published program.
    It also takes a direction for impossible if there is any place in the image, mostly in a corner, from which the
    whole footprint would lie outside.
    """
    middle, reach = masks.shape[1] // 2, geometry.length + margin
    footprints = []
    for mask in masks:
        offsets = np.argwhere(mask == 255) - middle + 1
        footprints.append(offsets[(np.abs(offsets) <= reach).all(axis=1)])
    edge = np.unique([*range(reach + 2), geometry.size // 2, *range(geometry.size - reach - 2, geometry.size)])
    places = np.stack(np.meshgrid(edge, edge, indexing="ij"), axis=-1).reshape(-1, 1, 2)

    def possible(offsets: np.ndarray) -> bool:
        pixels = places + offsets
        return bool(((pixels >= 0) & (pixels < geometry.size)).all(axis=-1).any(axis=-1).all())

    return footprints, np.array([len(offsets) > 0 and possible(offsets) for offsets in footprints])


def _first_tails(offsets: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """The lowest y and x, in the image, of a first seed's tail, and how many there are of each.

    The footprint keeps away from the border by two seed distances.
    """
    lowest = 2 * geometry.seed_distance - offsets.min(axis=0)
    highest = geometry.size - 2 * geometry.seed_distance - 1 - offsets.max(axis=0)
    return lowest, np.maximum(highest - lowest + 1, 0)
