"""Turns records into the tables of `experiments/benchmarks/README.md`.

    python -m experiments.benchmarks.table experiments/benchmarks/results/*.json

Replaces what stands between the two markers. Of several measurements of the same thing the latest counts, and one of
this program before one that was taken elsewhere, which keeps its source as a footnote.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks.implementations import OURS
from experiments.benchmarks.record import Record, Row, speedups
from pallas_kernels.records import write_atomically

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ORDER = ("mosaic_gpu", "triton", "xla", "butterfly", "jnp_fft", "torch_real", "torch_complex", "flashfftconv", "cudnn")
NOT_MEASURED = "not measured"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the tables; what is wrong with a file is one sentence, and the page stays as it was."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("records", type=Path, nargs="+", help="JSON files")
    parser.add_argument("--readme", type=Path, default=README, help="the file that holds the markers")
    settings = parser.parse_args(argv)
    try:
        text = markdown([Record.read(path) for path in settings.records])
        replace(settings.readme, text)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {settings.readme}")


def replace(readme: Path, text: str) -> None:
    """Puts the text between the markers of a file.

    Raises:
      ValueError: if it is not a file that can be read and written, or does not hold the markers.
    """
    try:
        write_atomically(readme, between_markers(readme.read_text(), text))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"readme must be a page with the two markers; got {readme} ({reason}).") from error


def between_markers(page: str, text: str) -> str:
    """The page with the text between its markers.

    Raises:
      ValueError: if the page does not hold each marker once, in their order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"it must hold {BEGIN} and then {END}, each once")
    return f"{page.partition(BEGIN)[0]}{BEGIN}\n\n{text}\n\n{END}{page.partition(END)[2]}"


def markdown(records: list[Record]) -> str:
    """One section for each device and one table for each protocol, dtype, direction and gating."""
    sections = []
    for device in dict.fromkeys(record.device for record in records):
        mine = [record for record in records if record.device == device]
        rows = latest(mine)
        run = [record for record in mine if any(row.source is None for row in record.rows)]
        provenance = "; ".join(dict.fromkeys(f"{each.date[:10]}, jax {each.versions['jax']}" for each in run))
        sections.append(f"## {device}\n\n{f'Measured {provenance}.' if run else 'Nothing measured by this program.'}")
        panels = dict.fromkeys(row.case[:4] for row in rows)
        timed = [panel for panel in panels if any(row.ms is not None for row in rows if row.case[:4] == panel)]
        sections += [table(panel, rows) for panel in timed]
        if untimed := [title(panel) for panel in panels if panel not in timed]:
            sections.append(f"Not measured at all: {'; '.join(untimed)}.")
        sources = list(dict.fromkeys(row.source for row in rows if row.source))
        sections += [f"[{mark}] {source}" for mark, source in enumerate(sources, 1)]
    return "\n\n".join(sections)


def latest(records: list[Record]) -> list[Row]:
    """Of each case and implementation the row that counts, in the order of the tables."""
    best: dict[tuple, tuple[tuple[bool, bool, str], Row]] = {}
    for record in records:
        for row in record.rows:
            rank = (row.status == "measured", row.source is None, record.date)
            key = (*row.case, row.implementation)
            if key not in best or rank >= best[key][0]:
                best[key] = (rank, row)
    return sorted(
        (row for _, row in best.values()),
        key=lambda row: (row.protocol, row.dtype, row.direction, row.gated, row.length),
    )


def title(panel: tuple) -> str:
    """What a table is about."""
    protocol, dtype, direction, gated = panel
    return f"{protocol}, {dtype}, {direction}{', gated' if gated else ''}"


def table(panel: tuple, rows: list[Row]) -> str:
    """Milliseconds of every implementation over the length, with floors, speed-ups, error and memory of our fastest."""
    mine = [row for row in rows if row.case[:4] == panel]
    sources = list(dict.fromkeys(row.source for row in rows if row.source))
    timed = {row.implementation for row in mine if row.ms is not None}
    names = [name for name in ORDER if name in timed or name == "mosaic_gpu"]
    count = {row.scaled_rows or (row.batch or 0) * (row.features or 0) for row in mine if row.ms is not None}
    header = ["L", *(f"{name}, ms" for name in names), "memory floor", "tensor floor"]
    header += ["ours over `jnp_fft`", "ours over best rival", "error", "temp / u"]
    about = title(panel)
    lines = [f"### {about[0].upper()}{about[1:]}, {' or '.join(f'{n:,}' for n in sorted(count))} rows", ""]
    lines += [f"| {' | '.join(header)} |", f"|{' ---: |' * len(header)}"]
    for length in dict.fromkeys(row.length for row in mine):
        here = {row.implementation: row for row in mine if row.length == length}
        ours = [row for name, row in here.items() if name in OURS and row.status == "measured" and row.ms is not None]
        fastest = min(ours, key=lambda row: row.ms or 0.0, default=None)
        cells = [f"{length:,}", *(time(here.get(name), fastest, sources) for name in names)]
        floors = next((row for row in here.values() if row.memory_floor_ms is not None), None)
        cells += [significant(floors.memory_floor_ms), significant(floors.tensor_floor_ms)] if floors else ["", ""]
        if fastest is None:
            cells += ["", "", "", ""]
        else:
            by_hand, best, rival = speedups(fastest, mine)
            cells += ["" if by_hand is None else f"{by_hand:.1f}x", "" if best is None else f"{best:.1f}x ({rival})"]
            cells += ["" if fastest.error is None else f"{fastest.error:.1e}"]
            cells += ["" if fastest.temporary_per_u is None else f"{fastest.temporary_per_u:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def time(row: Row | None, fastest: Row | None, sources: list[str]) -> str:
    """A cell: our fastest in bold, a star for a scaled time, the source of one taken elsewhere."""
    if row is None or row.ms is None:
        return NOT_MEASURED if row is None else row.status
    text = f"{significant(row.ms)}{'' if row.scaled_rows is None else '\\*'}"
    if row.status == "wrong":
        return f"{text} (wrong)"
    text = f"**{text}**" if row is fastest else text
    return text if row.source is None else f"{text} [{sources.index(row.source) + 1}]"


def significant(value: float | None) -> str:
    """Three digits, never an exponent for what takes long."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".removesuffix(".")


if __name__ == "__main__":
    main()
