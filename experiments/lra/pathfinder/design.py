"""What a Pathfinder image is made of: the numbers that Long Range Arena chose for each size and difficulty.

A snake is a contour of paddles, which are short straight lines; an image has two target snakes and shorter distractors.
Lengths are in pixels.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

type Difficulty = Literal["curv_baseline", "curv_contour_length_9", "curv_contour_length_14"]

CONTOUR_LENGTHS: Final[dict[str, int]] = {
    "curv_baseline": 6,
    "curv_contour_length_9": 9,
    "curv_contour_length_14": 14,
}
ANTIALIAS: Final = 2  # lines and discs are drawn twice as large, and reduced
TRIALS_OF_A_PADDLE: Final = 3
TRIALS_OF_A_DISTRACTOR: Final = 5


@dataclass(frozen=True)
class Geometry:
    """The sizes of one task.

    Attributes:
      size: of the square image.
      padding: width of the border where no paddle may lie.
      seed_distance: from the beginning of one target snake to that of the other; both begin in the middle.
      marker_radius: of the discs.
      length: of a paddle.
      thickness: of a paddle.
      margins: how far other paddles keep away; each image has one of them.
      continuity: how strongly a snake goes straight on; at least 1.
      target_contrast: brightness of target snakes, where that of the discs is 1.
      distractor_contrast: of distractors.
      distractor_paddles: of all distractors together.
    """

    size: int
    padding: int
    seed_distance: int
    marker_radius: float
    length: int
    thickness: float
    margins: tuple[int, ...]
    continuity: float
    target_contrast: float
    distractor_contrast: float
    distractor_paddles: int

    @property
    def reach(self) -> int:
        """Farthest pixel, along an axis, that a paddle with its thickness touches, without its margin."""
        return self.length + math.ceil(self.thickness)


GEOMETRIES: Final = {
    32: Geometry(32, 1, 7, 1.5, 2, 0.5, (1,), 1.0, 1.5, 2.0, 20),
    64: Geometry(64, 1, 12, 2.5, 5, 1.0, (1,), 1.8, 0.8, 0.8, 22),
    128: Geometry(128, 1, 20, 3.0, 5, 1.5, (2, 3), 1.8, 0.9, 0.9, 35),
    256: Geometry(256, 22, 27, 5.0, 5, 2.0, (3,), 1.8, 1.0, 1.0, 30),
}


@dataclass(frozen=True)
class Design:
    """A task: a size and a difficulty.

    Attributes:
      size: 32, 64, 128 (Path-X) or 256 (Path256) pixels.
      difficulty: of the three of Long Range Arena. What the literature calls Pathfinder is the last, hardest one.
      distractors: how many each image should have; fewer fit. None is the published number of paddles divided by the
        distractors' length; the authors' program leaves open whether the length is that of the difficulty, as here,
        which gives 5, 8 and 7 distractors of four paddles for 32, 128 and 256 pixels, or that of the easiest one, which
        gives 10, 17 and 15.
    """

    size: int = 32
    difficulty: Difficulty = "curv_contour_length_14"
    distractors: int | None = None

    def __post_init__(self) -> None:
        if self.size not in GEOMETRIES:
            raise ValueError(f"size must be {', '.join(map(str, GEOMETRIES))}; got {self.size}.")
        if self.difficulty not in CONTOUR_LENGTHS:
            raise ValueError(f"difficulty must be one of {', '.join(CONTOUR_LENGTHS)}; got {self.difficulty!r}.")
        if self.distractors is not None and self.distractors < 0:
            raise ValueError(f"distractors must be at least 0; got {self.distractors}.")

    @property
    def geometry(self) -> Geometry:
        """The sizes."""
        return GEOMETRIES[self.size]

    @property
    def contour_length(self) -> int:
        """Paddles of a target snake."""
        return CONTOUR_LENGTHS[self.difficulty]

    @property
    def distractor_length(self) -> int:
        """Paddles of a distractor."""
        return self.contour_length // 3

    @property
    def number_of_distractors(self) -> int:
        """As many are tried."""
        if self.distractors is not None:
            return self.distractors
        return self.geometry.distractor_paddles // self.distractor_length

    @property
    def name(self) -> str:
        """Every choice."""
        return f"{self.size}-{self.difficulty}-distractors{self.number_of_distractors}"
