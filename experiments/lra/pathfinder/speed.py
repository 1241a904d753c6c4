"""Measures how fast images are drawn, and what they are like: `python -m experiments.lra.pathfinder.speed --help`.

Speeds are images in a second of one core, by the processor's time, so that other programs beside it hardly count.
Tables are made once for each process.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from experiments.lra.pathfinder import images, stamps
from experiments.lra.pathfinder.design import CONTOUR_LENGTHS, GEOMETRIES, Design
from pallas_kernels.records import package_versions, write_atomically


@dataclass(frozen=True)
class Row:
    """Of one size and difficulty."""

    size: int
    difficulty: str
    images: int
    table_seconds: float
    images_per_core_second: float
    attempts_per_image: float
    """At the pair of target snakes, with those whose first direction the rules never place."""
    distractors_per_image: float
    mean_gray: float
    share_of_pixels_lit: float


def measure(design: Design, chunks: int, seed: int = 0) -> Row:
    """Draws so many chunks."""
    stamps.tables.cache_clear()
    start = time.process_time()
    tables = [stamps.tables(design.geometry, margin) for margin in design.geometry.margins]
    made = time.process_time()
    drawn = [images.draw_chunk(seed, design, 0, number) for number in range(chunks)]
    seconds = time.process_time() - made
    pixels = np.concatenate([chunk.images for chunk in drawn])
    live = np.mean([len(one.first_directions) for one in tables]) / stamps.SEED_DIRECTIONS
    return Row(
        design.size,
        design.difficulty,
        len(pixels),
        round(made - start, 2),
        round(len(pixels) / seconds, 1),
        round(float(sum(chunk.attempts for chunk in drawn) / len(pixels) / live), 1),
        round(float(np.concatenate([chunk.distractors for chunk in drawn]).mean()), 3),
        round(float(pixels.mean()), 3),
        round(float((pixels > 0).mean()), 4),
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table."""
    head = "| size | difficulty | images | images/s of a core | attempts | distractors | mean gray |"
    lines = [
        f"| {row.size} | `{row.difficulty}` | {row.images:,} | {row.images_per_core_second:,.0f} "
        f"| {row.attempts_per_image:,.0f} | {row.distractors_per_image:.2f} | {row.mean_gray:.2f} |"
        for row in rows
    ]
    return "\n".join([head, "| ---: | --- | ---: | ---: | ---: | ---: | ---: |", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], prog="python -m experiments.lra.pathfinder.speed"
    )
    parser.add_argument("--sizes", nargs="+", type=int, choices=list(GEOMETRIES), default=[32, 128, 256])
    parser.add_argument("--difficulties", nargs="+", choices=list(CONTOUR_LENGTHS), default=list(CONTOUR_LENGTHS))
    parser.add_argument("--chunks", type=int, default=2, help="of 500 images of 32 pixels, else 100 (default: 2)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    if options.chunks < 1:
        parser.error(f"--chunks must be at least 1; got {options.chunks}")
    rows = [
        measure(Design(size, difficulty), options.chunks)
        for size in options.sizes
        for difficulty in options.difficulties
    ]
    print(markdown(rows))
    if options.out is not None:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu": platform.processor() or platform.machine(),
            "versions": {"python": platform.python_version(), **package_versions(("numpy", "pillow"))},
            "rows": [asdict(row) for row in rows],
        }
        try:
            write_atomically(options.out, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise SystemExit(f"error: out must be a file that can be written; got {options.out} ({error}).") from error


if __name__ == "__main__":
    main()
