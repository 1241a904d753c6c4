"""Pathfinder by the published rules, one image and one paddle at a time, on whole images and in float64.

Slow and plain: it knows no tables, no canvases with borders and no shortcuts. The rules are those of
drewlinsley/pathfinder at commit ab9c130 with the picture functions of the SciPy of its time; cv2's dilation counts what
is outside of an image as less than anything inside.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from experiments.lra.pathfinder.design import Design


class Paddle(NamedTuple):
    """Where it is drawn from, and in which direction."""

    y: int
    x: int
    angle: float


class Snake(NamedTuple):
    paddles: list[Paddle]


class Scene(NamedTuple):
    image: np.ndarray
    label: int
    targets: list[Snake]
    distractors: list[Snake]
    attempts: int


def translate(y: int, x: int, angle: float, distance: float) -> tuple[int, int]:
    return int(np.ceil(y + distance * np.sin(angle))), int(np.ceil(x + distance * np.cos(angle)))


def flipped(angle: float) -> float:
    return angle + np.pi if angle < 0 else angle - np.pi


def circle(radius: float) -> np.ndarray:
    reach = int(radius)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    return y**2 + x**2 <= radius**2


def dilated(image: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    return ndimage.maximum_filter(image, footprint=footprint, mode="constant", cval=-np.inf)


def reduced(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    resized = Image.fromarray(image.astype(np.uint8)).resize(shape[::-1], Image.Resampling.LANCZOS)
    return np.asarray(resized).astype(float) / 255


@functools.cache
def stamps(design: Design, margin: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """A paddle around the middle of a square, and its mask, from 0 to 1."""
    geometry = design.geometry
    half = geometry.length + int(np.ceil(geometry.thickness)) + margin
    blown = Image.new("F", (4 * half + 1, 4 * half + 1), 0)
    y, x = translate(2 * half, 2 * half, angle, 2 * geometry.length)
    ImageDraw.Draw(blown).line([(2 * half, 2 * half), (x, y)], fill=255, width=int(2 * geometry.thickness))
    line = np.asarray(blown).astype(float)
    side = (2 * half + 1, 2 * half + 1)
    return reduced(line, side), reduced(dilated(line, circle(2 * margin)), side)


def placed(stamp: np.ndarray, y: int, x: int, size: int) -> np.ndarray:
    """The stamp on an empty image, as far as it is inside."""
    half = stamp.shape[0] // 2
    large = np.zeros((size + 2 * half, size + 2 * half))
    if -half <= y < size + half and -half <= x < size + half:
        window = large[max(y, 0) : y + 2 * half + 1, max(x, 0) : x + 2 * half + 1]
        window[:] = stamp[max(-y, 0) :, max(-x, 0) :][: window.shape[0], : window.shape[1]]
    return large[half : half + size, half : half + size]


def line_of(design: Design, margin: int, paddle: Paddle) -> np.ndarray:
    return placed(stamps(design, margin, paddle.angle)[0], paddle.y, paddle.x, design.size)


def mask_of(design: Design, margin: int, paddle: Paddle) -> np.ndarray:
    return placed(stamps(design, margin, paddle.angle)[1], paddle.y, paddle.x, design.size)


def ring(size: int, width: int) -> np.ndarray:
    mask = np.ones((size, size))
    mask[width : size - width, width : size - width] = 0
    return mask


def inside(design: Design, *points: tuple[int, int]) -> bool:
    return all(0 <= y < design.size and 0 <= x < design.size for y, x in points)


def available_tails(design: Design, margin: int, mask: np.ndarray, angle: float) -> np.ndarray:
    """Where a seed of this direction may begin, (places, 2)."""
    reach = design.geometry.length + margin
    stamp = stamps(design, margin, angle)[1]
    # Drawn one pixel below and to the right of the middle, into a window of its own size.
    window = placed(stamp, reach + 1, reach + 1, 2 * reach + 1)
    blocked = np.ceil(dilated(mask, window == 1) - 0.3)
    if blocked.min() < 0:
        return np.zeros((0, 2), int)
    return np.argwhere(blocked == 0)


def candidates(design: Design, margin: int, pivot: tuple[int, int], angle: float, mask: np.ndarray):
    """Where a snake may go on: places (n, 2), their angles and probabilities; None if there is nowhere."""
    radius = design.geometry.length + margin
    around = np.arange(0, 360, 360 / (2 * np.pi * radius)) * np.pi / 180
    y, x = pivot[0] + radius * np.sin(around), pivot[1] + radius * np.cos(around)
    within = (y >= 0) & (y < design.size) & (x >= 0) & (x < design.size)
    if not within.any():
        return None
    places = np.unique(np.stack([y, x], axis=-1)[within].astype(int), axis=0)
    angles = np.arctan2(places[:, 0] - pivot[0], places[:, 1] - pivot[1])
    turn = np.abs(angles - angle)
    turn = np.minimum(design.geometry.continuity * np.minimum(turn, 2 * np.pi - turn), np.pi / 2)
    free = 1 - dilated(mask, circle(margin))[places[:, 0], places[:, 1]]
    weights = free * np.maximum(np.cos(turn), 0) ** 2
    if weights.sum() < 1e-4:
        return None
    return places, angles, weights / weights.sum()


class Growing:
    """A snake that is being extended; its last paddle is not part of the mask yet."""

    def __init__(self, design: Design, margin: int, tail: tuple[int, int], angle: float) -> None:
        self.design, self.margin, self.angle = design, margin, angle
        head = translate(*tail, angle, design.geometry.length)
        self.pivot = translate(*head, flipped(angle), design.geometry.length + margin)
        self.paddles = [Paddle(*tail, angle)]
        self.possible = inside(design, head, self.pivot)

    def extend(self, rng: np.random.Generator, mask: np.ndarray) -> np.ndarray | None:
        """The mask with the paddle that was the last one, or None if there is no place for another one."""
        geometry = self.design.geometry
        pivot = translate(*self.pivot, self.angle, geometry.length + 2 * self.margin)
        found = candidates(self.design, self.margin, pivot, self.angle, mask)
        if found is None:
            return None
        places, angles, probabilities = found
        for _ in range(3):
            chosen = rng.choice(len(places), p=probabilities)
            paddle = Paddle(int(places[chosen, 0]), int(places[chosen, 1]), flipped(angles[chosen]))
            if (mask + mask_of(self.design, self.margin, paddle)).max() < 1.8:
                before = self.paddles[-1]
                self.pivot, self.angle = pivot, angles[chosen]
                self.paddles.append(paddle)
                return np.maximum(mask, mask_of(self.design, self.margin, before))
        return None


def random_angle(rng: np.random.Generator) -> float:
    return rng.integers(-180, 180) * np.pi / 180


def pair(rng: np.random.Generator, design: Design, margin: int) -> tuple[list[Snake], np.ndarray] | None:
    """One attempt."""
    distance = design.geometry.seed_distance
    mask = ring(design.size, design.geometry.padding)
    angle = random_angle(rng)
    tails = available_tails(design, margin, np.maximum(mask, ring(design.size, 2 * distance)), angle)
    if len(tails) == 0:
        return None
    tail = tuple(map(int, rng.choice(tails)))
    first = Growing(design, margin, tail, angle)
    around = rng.integers(0, 360) * np.pi / 180
    other = (int(np.round(tail[0] + distance * np.sin(around))), int(np.round(tail[1] + distance * np.cos(around))))
    second = Growing(design, margin, other, random_angle(rng))
    assert first.possible
    assert second.possible
    for _ in range(design.contour_length - 1):
        for snake in (first, second):
            extended = snake.extend(rng, mask)
            if extended is None:
                return None
            mask = extended
    mask = np.maximum(mask, mask_of(design, margin, second.paddles[-1]))
    return [Snake(first.paddles), Snake(second.paddles)], mask


def distractor(rng: np.random.Generator, design: Design, margin: int, mask: np.ndarray):
    """One trial: the snake and the new mask, or None."""
    for _ in range(3):
        if (mask <= 0.3).mean() < 0.01:
            return None
        angle = random_angle(rng)
        tails = available_tails(design, margin, np.maximum(mask, ring(design.size, 1)), angle)
        if len(tails) == 0:
            return None
        snake = Growing(design, margin, tuple(map(int, rng.choice(tails))), angle)
        if snake.possible:
            break
    else:
        return None
    for _ in range(design.distractor_length - 1):
        extended = snake.extend(rng, mask)
        if extended is None:
            return None
        mask = extended
    return Snake(snake.paddles), np.maximum(mask, mask_of(design, margin, snake.paddles[-1]))


def disc(design: Design, y: int, x: int) -> np.ndarray:
    size, radius = design.size, design.geometry.marker_radius
    far_y, far_x = np.ogrid[-2 * y : 2 * (size - y), -2 * x : 2 * (size - x)]
    return reduced(np.where(far_y**2 + far_x**2 <= (2 * radius) ** 2, 255, 0), (size, size))


def picture(
    design: Design, margin: int, targets: list[Snake], distractors: list[Snake], label: int, marked: int
) -> np.ndarray:
    """uint8 (size, size)."""
    image = np.zeros((design.size, design.size))
    for contrast, snakes in (
        (design.geometry.target_contrast, targets),
        (design.geometry.distractor_contrast, distractors),
    ):
        for snake in snakes:
            for paddle in snake.paddles:
                image = np.maximum(image, contrast * line_of(design, margin, paddle))
    ending = targets[marked if label == 1 else 1 - marked]
    for paddle in (targets[marked].paddles[0], ending.paddles[-1]):
        image = np.maximum(image, disc(design, paddle.y, paddle.x))
    scaled = (image - image.min()) * (255 / (image.max() - image.min()))
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)


def draw(rng: np.random.Generator, design: Design) -> Scene:
    """One image."""
    label = int(rng.integers(0, 2))
    margin = int(rng.choice(design.geometry.margins))
    attempts = 1
    while (found := pair(rng, design, margin)) is None:
        attempts += 1
    targets, mask = found
    distractors = []
    for _ in range(design.number_of_distractors):
        for _ in range(5):
            placed_one = distractor(rng, design, margin, mask)
            if placed_one is not None:
                snake, mask = placed_one
                distractors.append(snake)
                break
    marked = int(rng.integers(0, 2))
    return Scene(picture(design, margin, targets, distractors, label, marked), label, targets, distractors, attempts)
