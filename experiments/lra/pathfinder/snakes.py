"""Places paddles: pairs of target snakes, and distractors between them, for many images at once.

A pair starts anew whenever one of its paddles finds no place, which is hundreds of times for every image. So thousands
of attempts advance in step, a paddle each, and those that fail drop out. Nothing is drawn meanwhile: each canvas has a
mask, where paddles are, and the same dilated, which says what candidates are too near to one.
"""

from typing import NamedTuple

import numpy as np

from experiments.lra.pathfinder.design import TRIALS_OF_A_DISTRACTOR, TRIALS_OF_A_PADDLE, Design
from experiments.lra.pathfinder.stamps import OCCUPIED, SEED_DIRECTIONS, Pixels, Tables, step

_LEAST_WEIGHT = 255 * 1e-4  # of all candidates together, times 255
_LEAST_FREE = 0.01  # of the image, for another distractor
_GUESSES = 16  # places for a distractor that are tried before all of them are


class Paddles(NamedTuple):
    """Snakes of one length.

    Attributes:
      directions: int64 (..., paddles).
      places: int64 (..., paddles), in the canvas.
    """

    directions: np.ndarray
    places: np.ndarray


class Distractors(NamedTuple):
    """Snakes that found a place.

    Attributes:
      images: int64 (snakes,), which image each is in.
      paddles: (snakes, paddles).
    """

    images: np.ndarray
    paddles: Paddles


class Canvases:
    """The masks of several images, one after the other; a place is a number of a pixel of all of them."""

    def __init__(self, mask: np.ndarray, dilated: np.ndarray) -> None:
        self.mask = mask
        """uint8 (images, width²)."""
        self.dilated = dilated
        """uint8 (images, width²)."""

    @classmethod
    def empty(cls, tables: Tables, images: int) -> "Canvases":
        """Without any paddle."""
        mask, dilated = (np.repeat(one[None], images, axis=0) for one in (tables.ring, tables.ring_dilated))
        return cls(mask, dilated)

    def __getitem__(self, images: np.ndarray) -> "Canvases":
        """Copies."""
        return Canvases(self.mask[images], self.dilated[images])

    def __setitem__(self, images: np.ndarray, others: "Canvases") -> None:
        self.mask[images] = others.mask
        self.dilated[images] = others.dilated

    def first_places(self, images: np.ndarray) -> np.ndarray:
        """Of the first pixel of each image."""
        return images * self.mask.shape[1]

    def add(self, tables: Tables, directions: np.ndarray, places: np.ndarray) -> None:
        """Protects these paddles, at most one in an image, from others."""
        stamp(self.mask.reshape(-1), tables.masks, directions, places)
        stamp(self.dilated.reshape(-1), tables.dilated, directions, places)


def stamp(canvas: np.ndarray, pixels: Pixels, directions: np.ndarray, places: np.ndarray) -> None:
    """Makes the canvas the maximum of itself and of pictures, which may not overlap each other."""
    where = places[:, None] + pixels.offsets[directions]
    canvas[where] = np.maximum(canvas.take(where), pixels.values[directions])


def targets(
    rng: np.random.Generator, tables: Tables, design: Design, count: int, at_once: int
) -> tuple[Paddles, Canvases, int]:
    """So many pairs of snakes, (count, 2, contour length), in canvases of their own; and how many attempts it took."""
    found: list[Paddles] = []
    canvases: list[Canvases] = []
    missing, successes, attempts = count, 0, 0
    while missing:
        size = at_once
        if successes:  # hardly more than are needed
            size = min(at_once, 32 + int(1.25 * missing * attempts / successes))
        paddles, masks = _attempt(rng, tables, design, size)
        paddles = Paddles(paddles.directions[:missing], paddles.places[:missing])
        attempts += size
        successes += len(masks.mask)
        found.append(paddles)
        canvases.append(Canvases(masks.mask[:missing], masks.dilated[:missing]))
        missing -= len(paddles.places)
    both = Canvases(
        np.concatenate([some.mask for some in canvases]), np.concatenate([some.dilated for some in canvases])
    )
    return Paddles(*map(np.concatenate, zip(*found, strict=True))), both, attempts


def _attempt(rng: np.random.Generator, tables: Tables, design: Design, count: int) -> tuple[Paddles, Canvases]:
    """What becomes of so many attempts at a pair: those that succeed, with places counted within each canvas."""
    canvases = Canvases.empty(tables, count)
    directions = np.empty((2, design.contour_length, count), np.int64)
    places = np.empty_like(directions)
    pivots = np.empty((2, count, 2), np.int64)
    rows = np.arange(count)
    first = canvases.first_places(rows)
    directions[:, 0], places[:, 0], pivots[:] = _seed_pairs(rng, tables, design, first)
    for paddle in range(1, design.contour_length):
        for snake in (0, 1):
            before = directions[snake, paddle - 1, rows], places[snake, paddle - 1, rows]
            extended, pivot, direction, place = _extend(
                rng, tables, canvases, first[rows], pivots[snake, rows], before[0]
            )
            rows = rows[extended]
            pivots[snake, rows] = pivot
            directions[snake, paddle, rows] = direction
            places[snake, paddle, rows] = place
            # The new paddle is not protected before its successor has found a place.
            canvases.add(tables, before[0][extended], before[1][extended])
    # At the end, the published program protects the last paddle of the second snake, and not that of the first.
    canvases.add(tables, directions[1, -1, rows], places[1, -1, rows])
    survivors = Paddles(
        directions[:, :, rows].transpose(2, 0, 1), (places[:, :, rows] - first[rows]).transpose(2, 0, 1)
    )
    return survivors, canvases[rows]


def _seed_pairs(
    rng: np.random.Generator, tables: Tables, design: Design, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first paddles of two snakes: directions and places, (2, attempts), and pivots, (2, attempts, 2).

    The second begins at the seed distance from where the first does, in any direction. In all geometries both are so
    far from the border that nothing can be outside.
    """
    choice = rng.integers(0, len(tables.first_directions), len(first))
    lowest, ranges = np.moveaxis(tables.first_tails[choice], 1, 0)
    tail = lowest + rng.integers(0, ranges)
    angle = rng.integers(0, 360, len(first)) * np.pi / 180
    around = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    # Halves are rounded to even sums, not to even displacements.
    second_tail = np.round(tail + design.geometry.seed_distance * around).astype(np.int64)
    directions = np.stack([tables.first_directions[choice], rng.integers(0, SEED_DIRECTIONS, len(first))])
    tails = np.stack([tail, second_tail])
    pivots = step(step(tails, tables.head_steps[directions]), tables.back_steps[directions])
    return directions, first + place_of(tables, tails), pivots


def place_of(tables: Tables, points: np.ndarray) -> np.ndarray:
    """In a canvas, of points (..., 2)."""
    return (points + tables.border) @ (tables.width, 1)


def _extend(
    rng: np.random.Generator,
    tables: Tables,
    canvases: Canvases,
    first: np.ndarray,
    pivots: np.ndarray,
    directions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Another paddle for each snake, in the canvas that begins at `first`, behind the last one.

    Returns:
      Which snakes (a mask) have it; and theirs alone, its pivot, direction and place.
    """
    pivots = step(pivots, tables.pivot_steps[directions])
    candidates = (first + place_of(tables, pivots))[:, None] + tables.candidates[directions]
    sums = np.cumsum(tables.weights[directions] * (255 - canvases.dilated.reshape(-1).take(candidates)), axis=1)
    extended = np.zeros(len(pivots), bool)
    chosen = np.zeros(len(pivots), np.int64)
    open_ = np.flatnonzero(sums[:, -1] >= _LEAST_WEIGHT)
    mask = canvases.mask.reshape(-1)
    for _ in range(TRIALS_OF_A_PADDLE):
        drawn = rng.random(len(open_), np.float32) * sums[open_, -1]
        # The comparison is strict, so that a candidate without weight is never drawn.
        drawn_candidates = np.argmax(sums[open_] > drawn[:, None], axis=1)
        direction = tables.candidate_numbers[directions[open_], drawn_candidates]
        place = candidates[open_, drawn_candidates]
        around = mask.take(place[:, None] + tables.cores.offsets[direction])
        fits = ~(around >= tables.cores.values[direction]).any(axis=1)
        extended[open_[fits]] = True
        chosen[open_[fits]] = drawn_candidates[fits]
        open_ = open_[~fits]
        if len(open_) == 0:
            break
    rows = np.flatnonzero(extended)
    chosen = chosen[rows]
    return extended, pivots[rows], tables.candidate_numbers[directions[rows], chosen], candidates[rows, chosen]


def distractors(rng: np.random.Generator, tables: Tables, design: Design, canvases: Canvases) -> list[Distractors]:
    """Adds distractors to the canvases: as many as find a place within five trials each, one after the other."""
    found = []
    for _ in range(design.number_of_distractors):
        waiting = np.arange(len(canvases.mask))
        for _ in range(TRIALS_OF_A_DISTRACTOR):
            placed, paddles = _distractor(rng, tables, design, canvases, waiting)
            found.append(Distractors(waiting[placed], paddles))
            waiting = waiting[~placed]
            if len(waiting) == 0:
                break
    return found


def _distractor(
    rng: np.random.Generator, tables: Tables, design: Design, canvases: Canvases, images: np.ndarray
) -> tuple[np.ndarray, Paddles]:
    """One trial in each of some images: which (a mask) have a new distractor, and theirs alone."""
    seeded, direction, tail = _seed(rng, tables, design, canvases, images)
    rows = np.flatnonzero(seeded)
    trial = canvases[images[rows]]
    first = trial.first_places(np.arange(len(rows)))
    directions = np.empty((design.distractor_length, len(rows)), np.int64)
    places = np.empty_like(directions)
    directions[0], places[0] = direction, first + place_of(tables, tail)
    pivots = step(step(tail, tables.head_steps[direction]), tables.back_steps[direction])
    going = np.arange(len(rows))
    for paddle in range(1, design.distractor_length):
        before = directions[paddle - 1, going], places[paddle - 1, going]
        extended, pivot, direction, place = _extend(rng, tables, trial, first[going], pivots[going], before[0])
        going = going[extended]
        pivots[going] = pivot
        directions[paddle, going] = direction
        places[paddle, going] = place
        trial.add(tables, before[0][extended], before[1][extended])
    trial.add(tables, directions[-1, going], places[-1, going])
    canvases[images[rows[going]]] = trial[going]
    placed = np.zeros(len(images), bool)
    placed[rows[going]] = True
    return placed, Paddles(directions[:, going].T, (places[:, going] - first[going]).T)


def _seed(
    rng: np.random.Generator, tables: Tables, design: Design, canvases: Canvases, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A first paddle for a distractor in each of some images.

    It may be drawn three times, in case that its head or its pivot is outside.

    Returns:
      Which images (a mask) have one; and theirs alone, its direction and its tail, (images, 2).
    """
    masks = canvases.mask[images]
    free = np.count_nonzero(masks[:, tables.inside] < OCCUPIED, axis=1)
    waiting = np.flatnonzero(free >= _LEAST_FREE * design.size**2)
    blocked = blocked_places(tables, masks)
    seeded = np.zeros(len(images), bool)
    directions = np.zeros(len(images), np.int64)
    tails = np.zeros((len(images), 2), np.int64)
    for _ in range(TRIALS_OF_A_PADDLE):
        direction = rng.integers(0, SEED_DIRECTIONS, len(waiting))
        tail = _free_tails(rng, tables, design, blocked, waiting, direction)
        available = tail[:, 0] >= 0  # where nothing is, the trial has failed for good
        waiting, direction, tail = waiting[available], direction[available], tail[available]
        head = step(tail, tables.head_steps[direction])
        ends = np.concatenate([head, step(head, tables.back_steps[direction])], axis=1)
        fits = ((ends >= 0) & (ends < design.size)).all(axis=1)
        rows = waiting[fits]
        seeded[rows] = True
        directions[rows] = direction[fits]
        tails[rows] = tail[fits]
        waiting = waiting[~fits]
        if len(waiting) == 0:
            break
    return seeded, directions[seeded], tails[seeded]


def blocked_places(tables: Tables, masks: np.ndarray) -> np.ndarray:
    """What a footprint must not touch: paddles, and the outermost pixels of the image, but nothing outside of it."""
    blocked = masks >= OCCUPIED
    blocked[:, tables.outermost] = True
    blocked &= tables.inside
    return blocked


def _free_tails(
    rng: np.random.Generator,
    tables: Tables,
    design: Design,
    blocked: np.ndarray,
    rows: np.ndarray,
    directions: np.ndarray,
) -> np.ndarray:
    """For each row a point, drawn from all those from which the footprint is free; (-1, -1) if there is none.

    A few random points are looked at first, which is no other distribution, and all of them only if none is free.
    """
    tails = np.full((len(rows), 2), -1)
    flat, first = blocked.reshape(-1), rows * blocked.shape[1]
    alive = np.flatnonzero(tables.live[directions])
    guesses = rng.integers(0, design.size, (len(alive), _GUESSES, 2))
    around = (first[alive, None] + place_of(tables, guesses))[..., None] + tables.footprints[directions[alive]][:, None]
    free = ~flat.take(around).any(axis=-1)
    lucky = free.any(axis=1)
    tails[alive[lucky]] = guesses[lucky, free[lucky].argmax(axis=1)]
    everywhere = np.indices((design.size, design.size)).reshape(2, -1).T
    for row in alive[~lucky]:
        around = (first[row] + place_of(tables, everywhere))[:, None] + tables.footprints[directions[row]]
        free_points = everywhere[~flat.take(around).any(axis=-1)]
        if len(free_points):
            tails[row] = rng.choice(free_points)
    return tails
