"""Pathfinder as it is drawn: every image is one that the published rules allow, in the right proportions."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from experiments.lra.pathfinder import images, snakes, stamps
from experiments.lra.pathfinder.design import CONTOUR_LENGTHS, GEOMETRIES, Design
from tests.experiments import pathfinder_reference as reference
from tests.experiments.pathfinder_reference import Growing, Paddle, Snake

SIZES_AND_MARGINS = [(32, 1), (64, 1), (128, 2), (128, 3), (256, 3)]


def directions(design: Design, margin: int) -> np.ndarray:
    """The angles of the tables' directions."""
    around = np.arange(0, 360, 360 / (2 * np.pi * (design.geometry.length + margin))) * np.pi / 180
    radius = design.geometry.length + margin
    pixels = np.unique(np.floor(64 + radius * np.stack([np.sin(around), np.cos(around)], -1)).astype(int) - 64, axis=0)
    return np.concatenate([np.arange(-180, 180) * np.pi / 180, np.arctan2(pixels[:, 0], pixels[:, 1])])


def canvas(tables: stamps.Tables, pixels: stamps.Pixels, direction: int) -> np.ndarray:
    """A stamp in the middle of an image."""
    drawn = np.zeros(tables.width**2, np.uint8)
    middle = tables.width // 2 * (tables.width + 1)
    snakes.stamp(drawn, pixels, np.array([direction]), np.array([middle]))
    return drawn.reshape(tables.width, tables.width)


def inner(tables: stamps.Tables, flat: np.ndarray) -> np.ndarray:
    """The image of a canvas."""
    return flat.reshape(tables.width, tables.width)[tables.border : -tables.border, tables.border : -tables.border]


# tables


@pytest.mark.parametrize(
    ("size", "margin", "dead", "candidates"),
    [(32, 1, 330, 18), (64, 1, 265, 38), (128, 2, 6, 41), (128, 3, 0, 49), (256, 3, 0, 49)],
)
def test_directions_are_those_of_the_published_program(size, margin, dead, candidates):
    # Counted in the published program, whose dilation finds no place for these directions.
    tables = stamps.tables(GEOMETRIES[size], margin)
    assert np.count_nonzero(~tables.live) == dead
    assert len(tables.pivot_steps) == 360 + candidates


@pytest.mark.parametrize(("size", "margin"), SIZES_AND_MARGINS)
def test_stamps_are_those_of_the_published_program(size, margin):
    design = Design(size)
    tables = stamps.tables(design.geometry, margin)
    angles = directions(design, margin)
    middle = tables.width // 2
    for direction in [*range(0, 360, 37), *range(360, len(angles), 7)]:
        seed = direction < 360
        angle = angles[direction] if seed else reference.flipped(angles[direction])
        line, mask = reference.stamps(design, margin, angle)
        expected = reference.placed(line, middle, middle, tables.width)
        np.testing.assert_array_equal(canvas(tables, tables.lines, direction), np.round(255 * expected))
        expected = reference.placed(mask, middle, middle, tables.width)
        drawn = canvas(tables, tables.masks, direction)
        np.testing.assert_array_equal(drawn, np.where(expected > 0.3, np.round(255 * expected), 0))
        wide = reference.dilated(expected, reference.circle(margin))
        np.testing.assert_array_equal(canvas(tables, tables.dilated, direction), np.round(255 * wide))


def test_no_two_pixels_of_a_stamp_differ_at_one_place():
    """They are set all at once, so the last would win."""
    tables = stamps.tables(GEOMETRIES[128], 3)
    for pixels in (tables.lines, tables.masks, tables.dilated):
        for offsets, values in zip(pixels.offsets, pixels.values, strict=True):
            assert len(set(zip(offsets, values, strict=True))) == len(set(offsets))


@pytest.mark.parametrize(("size", "margin"), [(32, 1), (64, 1)])
def test_free_places_are_those_of_the_published_program(size, margin):
    """With paddles in the way: every free place is drawn, and no other one; nothing for directions that are dead."""
    rng = np.random.default_rng(0)
    design = Design(size)
    tables = stamps.tables(design.geometry, margin)
    canvases = snakes.Canvases.empty(tables, 1)
    for _ in range({32: 12, 64: 60}[size]):  # until little is free
        place = (rng.integers(0, size, 2) + tables.border) @ (tables.width, 1)
        canvases.add(tables, rng.integers(0, 360, 1), np.array([place]))
    alive, dead = np.flatnonzero(tables.live), np.flatnonzero(~tables.live)
    cases = [(canvases, direction) for direction in [*rng.choice(alive, 5), *dead[:2]]]
    if size == 64:
        cases.append((snakes.Canvases.empty(tables, 1), 40))  # from the outermost pixels, too: see below
    lowest = size
    for some, direction in cases:
        around = np.maximum(inner(tables, some.mask[0]) / 255, reference.ring(size, 1))
        expected = reference.available_tails(design, margin, around, directions(design, margin)[direction])
        draws = 20 * len(expected) + 50
        blocked = snakes.blocked_places(tables, some.mask)
        tails = snakes._free_tails(rng, tables, design, blocked, np.zeros(draws, int), np.full(draws, direction))
        if len(expected) == 0:
            assert (tails == -1).all()
            continue
        lowest = min(lowest, expected.min())
        points, counts = np.unique(tails, axis=0, return_counts=True)
        np.testing.assert_array_equal(points, expected)
        # Each about 20 times: χ² has as many degrees of freedom as there are places.
        mean = draws / len(expected)
        chi_squared = ((counts - mean) ** 2 / mean).sum()
        assert chi_squared < len(expected) + 6 * np.sqrt(2 * len(expected)) + 10
    assert lowest == 0 if size == 64 else lowest < size


def test_the_exhaustive_search_gives_the_same_places():
    """Random guesses never miss on a free image; so let them miss."""
    design = Design(32)
    tables = stamps.tables(design.geometry, 1)
    blocked = tables.inside[None].copy()
    direction = int(np.flatnonzero(tables.live)[3])
    for point in ((15, 20), (8, 9)):
        blocked[0, snakes.place_of(tables, np.array(point)) + tables.footprints[direction]] = False
    tails = snakes._free_tails(
        np.random.default_rng(0), tables, design, blocked, np.zeros(50, int), np.full(50, direction)
    )
    counts = Counter(map(tuple, tails.tolist()))  # two of 1,024 points: 16 guesses mostly miss them
    assert set(counts) == {(15, 20), (8, 9)}
    assert min(counts.values()) > 10  # of 50 draws; a standard deviation is 3.5


# images, replayed by the published rules


def drawn(size: int, margin: int, count: int, seed: int = 0):
    design = Design(size)
    tables = stamps.tables(design.geometry, margin)
    rng = np.random.default_rng(seed)
    targets, canvases, _ = snakes.targets(rng, tables, design, count, images.PACES[size].attempts)
    before = snakes.Canvases(canvases.mask.copy(), canvases.dilated.copy())
    others = snakes.distractors(rng, tables, design, canvases)
    return design, tables, targets, before, others, canvases


def paddles_of(design: Design, tables: stamps.Tables, margin: int, directions_, places) -> list[Paddle]:
    angles = directions(design, margin)
    found = []
    for direction, place in zip(directions_, places, strict=True):
        y, x = divmod(int(place), tables.width)
        angle = angles[direction] if direction < 360 else reference.flipped(angles[direction])
        found.append(Paddle(y - tables.border, x - tables.border, angle))
    return found


class Replay(Growing):
    """A snake that goes where it is known to have gone, if the rules allow it."""

    def __init__(self, design: Design, margin: int, paddles: list[Paddle]) -> None:
        super().__init__(design, margin, (paddles[0].y, paddles[0].x), paddles[0].angle)
        assert self.possible
        self.ahead = paddles[1:]

    def follow(self, mask: np.ndarray) -> np.ndarray:
        paddle = self.ahead.pop(0)
        pivot = reference.translate(*self.pivot, self.angle, self.design.geometry.length + 2 * self.margin)
        found = reference.candidates(self.design, self.margin, pivot, self.angle, mask)
        assert found is not None
        places, angles, probabilities = found
        (chosen,) = np.flatnonzero((places == (paddle.y, paddle.x)).all(axis=1))
        assert probabilities[chosen] > 1e-9
        assert reference.flipped(angles[chosen]) == pytest.approx(paddle.angle, abs=1e-12)
        assert (mask + reference.mask_of(self.design, self.margin, paddle)).max() < 1.8 + 1e-9
        mask = np.maximum(mask, reference.mask_of(self.design, self.margin, self.paddles[-1]))
        self.pivot, self.angle = pivot, angles[chosen]
        self.paddles.append(paddle)
        return mask


def assert_same_masks(tables, canvases, image, mask, margin):
    ours = inner(tables, canvases.mask[image])
    np.testing.assert_array_equal(ours, np.where(mask > 0.3, np.round(255 * mask), 0))
    wide = reference.dilated(mask, reference.circle(margin))
    np.testing.assert_array_equal(inner(tables, canvases.dilated[image]), np.round(255 * wide))


@pytest.mark.parametrize(("size", "margin", "count"), [(32, 1, 40), (64, 1, 3), (128, 2, 3), (128, 3, 3), (256, 3, 3)])
def test_every_paddle_is_where_the_rules_allow_it(size, margin, count):
    design, tables, targets, before, others, after = drawn(size, margin, count)
    labels, marked = np.arange(count) % 2, np.arange(count) // 2 % 2
    pictures = images.render(tables, design, targets, others, labels, marked)
    placed_distractors = 0
    for image in range(count):
        pair = [
            Replay(design, margin, paddles_of(design, tables, margin, *snake))
            for snake in zip(targets.directions[image], targets.places[image], strict=True)
        ]
        assert len(pair) == 2
        mask = reference.ring(size, design.geometry.padding)
        wide = np.maximum(mask, reference.ring(size, 2 * design.geometry.seed_distance))
        first, second = pair[0].paddles[0], pair[1].paddles[0]
        tails = reference.available_tails(design, margin, wide, first.angle)
        assert (tails == (first.y, first.x)).all(axis=1).any()
        # The seed distance, up to the rounding of both coordinates.
        assert abs(np.hypot(first.y - second.y, first.x - second.x) - design.geometry.seed_distance) < 0.75
        for _ in range(design.contour_length - 1):
            for snake in pair:
                mask = snake.follow(mask)
        assert [len(snake.ahead) for snake in pair] == [0, 0]
        mask = np.maximum(mask, reference.mask_of(design, margin, pair[1].paddles[-1]))
        assert_same_masks(tables, before, image, mask, margin)
        distractors = []
        for some in others:
            for row in np.flatnonzero(some.images == image):
                paddles = paddles_of(design, tables, margin, some.paddles.directions[row], some.paddles.places[row])
                snake = Replay(design, margin, paddles)
                tails = reference.available_tails(
                    design, margin, np.maximum(mask, reference.ring(size, 1)), paddles[0].angle
                )
                assert (tails == (paddles[0].y, paddles[0].x)).all(axis=1).any()
                for _ in range(design.distractor_length - 1):
                    mask = snake.follow(mask)
                mask = np.maximum(mask, reference.mask_of(design, margin, snake.paddles[-1]))
                distractors.append(Snake(snake.paddles))
        placed_distractors += len(distractors)
        assert_same_masks(tables, after, image, mask, margin)
        expected = reference.picture(
            design, margin, [Snake(snake.paddles) for snake in pair], distractors, labels[image], marked[image]
        )
        np.testing.assert_array_equal(pictures[image], expected)
    assert placed_distractors >= count  # there was something to replay


def test_the_next_paddle_is_drawn_with_its_probability():
    """The same choice 20,000 times, near other paddles: frequencies are those of the rules, three trials included."""
    rng = np.random.default_rng(0)
    margin, design = 1, Design(32)
    tables = stamps.tables(design.geometry, margin)
    angles = directions(design, margin)
    checked_clash = False
    for _ in range(12):
        canvases = snakes.Canvases.empty(tables, 1)
        places = (rng.integers(9, 23, (4, 2)) + tables.border) @ (tables.width, 1)
        for place in places:
            canvases.add(tables, rng.integers(0, 360, 1), place[None])
        mask = inner(tables, canvases.mask[0]) / 255
        exact = inner(tables, canvases.dilated[0]) / 255  # the dilation of the mask before small values were dropped
        direction, y, x = int(rng.integers(0, 360)), *rng.integers(12, 20, 2).tolist()
        pivot = reference.translate(y, x, angles[direction], design.geometry.length + 2 * margin)
        found = reference.candidates(design, margin, pivot, angles[direction], np.zeros((32, 32)))
        spots, turned, probabilities = found
        weights = probabilities * (1 - exact[spots[:, 0], spots[:, 1]])
        count = 20_000
        many = snakes.Canvases(np.broadcast_to(canvases.mask, (1, tables.width**2)), canvases.dilated)
        extended, _, _, chosen = snakes._extend(
            rng,
            tables,
            many,
            np.zeros(count, int),
            np.tile([y, x], (count, 1)),
            np.full(count, direction),
        )
        if weights.sum() < 1e-4:
            assert not extended.any()
            continue
        weights /= weights.sum()
        fits = np.array(
            [
                (mask + reference.mask_of(design, margin, Paddle(*spot, reference.flipped(angle)))).max() < 1.8
                for spot, angle in zip(spots.tolist(), turned, strict=True)
            ]
        )
        clash = weights[~fits].sum()
        checked_clash |= 0.05 < clash < 0.95
        expected = np.where(fits, weights, 0) * (1 + clash + clash**2)
        numbers = (spots + tables.border) @ (tables.width, 1)
        frequencies = np.array([np.count_nonzero(chosen == number) for number in numbers]) / count
        np.testing.assert_allclose(frequencies, expected, atol=0.018)  # five standard deviations at most
    assert checked_clash


# what the rules make of it


@pytest.fixture(scope="module")
def chunk32() -> images.Chunk:
    return images.draw_chunk(0, Design(32), 0, 0)


def test_statistics_are_those_of_the_published_program():
    """Of 3,000 images here: 337 ± 6 attempts, 1.148 ± 0.016 distractors, mean 20.14 ± 0.04.

    Of 600 by `pathfinder_reference`: 348 ± 14, 1.09 ± 0.04 and 20.10 ± 0.08. Of a few by the published program, which
    has no seed: 297, 1.25 and 20.4.
    """
    chunks = [images.draw_chunk(0, Design(32), 0, number) for number in range(2)]
    rows = sum(len(chunk.images) for chunk in chunks)
    live = len(stamps.tables(GEOMETRIES[32], 1).first_directions) / 360
    assert sum(chunk.attempts for chunk in chunks) / live / rows == pytest.approx(340, rel=0.12)
    assert np.concatenate([chunk.distractors for chunk in chunks]).mean() == pytest.approx(1.15, abs=0.12)
    assert np.concatenate([chunk.images for chunk in chunks]).mean() == pytest.approx(20.15, abs=0.35)


def test_path256_is_as_empty_as_in_the_published_program():
    chunk = images.draw_chunk(0, Design(256), 0, 0)
    assert chunk.distractors.mean() == pytest.approx(7.0, abs=0.1)
    assert chunk.images.mean() == pytest.approx(2.95, abs=0.06)
    assert chunk.attempts / len(chunk.images) == pytest.approx(8, abs=3)
    border = chunk.images.copy()
    border[:, 16:-16, 16:-16] = 0
    assert border.max() == 0


@pytest.mark.slow
def test_path_x_is_as_in_the_published_program():
    chunk = images.draw_chunk(0, Design(128), 0, 0)
    assert chunk.distractors.mean() == pytest.approx(7.68, abs=0.2)
    assert chunk.images.mean() == pytest.approx(7.9, abs=0.15)
    assert chunk.attempts / len(chunk.images) == pytest.approx(396, rel=0.25)


@pytest.mark.parametrize("difficulty", CONTOUR_LENGTHS)
def test_difficulties_differ_by_their_lengths(difficulty):
    design = Design(32, difficulty)
    assert (design.contour_length, design.distractor_length) == {
        "curv_baseline": (6, 2),
        "curv_contour_length_9": (9, 3),
        "curv_contour_length_14": (14, 4),
    }[difficulty]
    targets, *_ = snakes.targets(np.random.default_rng(0), stamps.tables(design.geometry, 1), design, 3, 512)
    assert targets.places.shape == (3, 2, design.contour_length)


@pytest.mark.parametrize(("size", "distractors"), [(32, 5), (64, 5), (128, 8), (256, 7)])
def test_the_numbers_of_distractors_are_the_published_ones(size, distractors):
    assert Design(size).number_of_distractors == distractors
    assert Design(size, distractors=3).number_of_distractors == 3
    assert Design(size, "curv_baseline").number_of_distractors == {32: 10, 64: 11, 128: 17, 256: 15}[size]


def test_images_use_all_of_a_byte_and_labels_are_even(chunk32):
    assert chunk32.images.dtype == np.uint8
    assert (chunk32.images.max(axis=(1, 2)) == 255).all()
    assert (chunk32.images.min(axis=(1, 2)) == 0).all()
    assert abs(chunk32.labels.mean() - 0.5) < 0.1  # 500 images: four standard deviations are 0.09
    assert set(chunk32.labels) == {0, 1}


@pytest.mark.parametrize("label", [0, 1])
def test_discs_are_on_one_snake_or_on_two(label):
    """Two discs in every image: at the first paddle of a snake, and at the last one of the same snake or the other."""
    design, tables, targets, _, _, _ = drawn(256, 3, 4)
    marked = np.array([0, 1, 0, 1])
    pictures = images.render(tables, design, targets, [], np.full(4, label), marked)
    bare = np.minimum(pictures, 0)
    for image, one in enumerate(marked):
        other = one if label else 1 - one
        for place in (targets.places[image, one, 0], targets.places[image, other, -1]):
            y, x = np.array(divmod(int(place), tables.width)) - tables.border
            around = np.hypot(*(np.mgrid[:256, :256] - np.array([y, x])[:, None, None])) < 4
            assert (pictures[image][around] > 240).all()
            bare[image][np.hypot(*(np.mgrid[:256, :256] - np.array([y, x])[:, None, None])) < 7] = 1
    lit = (pictures > 240) & (bare == 0)
    # No third disc: what else is bright is thin.
    eroded = lit[:, :-4, :-4] & lit[:, 4:, :-4] & lit[:, :-4, 4:] & lit[:, 4:, 4:] & lit[:, 2:-2, 2:-2]
    assert not eroded.any()


@pytest.mark.parametrize("place", [(0, 0), (2, 31), (16, 16), (31, 5), (7, 20)])
def test_discs_near_the_border_are_those_of_the_whole_image(place):
    design = Design(32)
    expected = reference.disc(design, *place)
    np.testing.assert_array_equal(images.disc(design, *place), np.round(255 * expected))


# that a seed says it all


def same(first: list[images.Row], second: list[images.Row]) -> bool:
    return all(
        np.array_equal(one.image, other.image) and one.label == other.label
        for one, other in zip(first, second, strict=True)
    )


EASY = Design(32, "curv_baseline")  # the fastest to draw


def take(count: int, seed: int = 0, **options) -> list[images.Row]:
    return list(itertools.islice(images.rows(seed, EASY, **options), count))


def test_images_do_not_depend_on_the_number_of_workers():
    alone = take(1100)  # beyond two chunks, so that several processes draw at once
    chunk = images.draw_chunk(0, EASY, 0, 1)
    np.testing.assert_array_equal([row.image for row in alone[500:1000]], chunk.images)
    assert same(take(1100, workers=2), alone)


def test_seeds_streams_and_chunks_differ():
    drawn_ones = [*take(1000), *take(500, seed=1), *take(500, stream=1)]
    assert len({row.image.tobytes() for row in drawn_ones}) == 2000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 33}, "size must be 32, 64, 128, 256; got 33."),
        ({"difficulty": "hard"}, "difficulty must be one of curv_baseline, curv_contour_length_9, curv_contour_"),
        ({"distractors": -1}, "distractors must be at least 0; got -1."),
    ],
)
def test_designs_say_what_they_expect(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Design(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be at least 0; got -1."),
        ({"seed": 0, "workers": 0}, "workers must be at least 1; got 0."),
    ],
)
def test_drawing_says_what_it_expects(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        images.rows(design=Design(), **arguments)
