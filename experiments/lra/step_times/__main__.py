"""Times a training step of each paper recipe on this machine's device.

    python -m experiments.lra.step_times --out FOLDER [--tasks pathx path256] [--variants 4 7] [--tiny]

For each of Long Range Arena's tasks, Path256 and CIFAR-10 in colour: the step of the preset `paper` with jnp.fft
("xla") and with the fused kernel ("mosaic_gpu"), in float32 and in bfloat16, and that of a Transformer as wide and as
deep, with the matrix of weights ("xla") and with flash attention ("cudnn"). Batches are random numbers of the right
shapes, so that neither data nor the libraries that read them are needed. A step is the loss, its gradient and AdamW.

FOLDER/step_times.json has a row for each; a second call measures only what is missing there. FOLDER/step_times.md is
the table. --tiny is for a look at the program on a CPU: its times mean nothing.
"""

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import jax

from experiments.lra.step_times import stand_ins

MISSING = stand_ins.install()

from experiments.lra.step_times.cases import cases  # noqa: E402 - after the stand-ins
from experiments.lra.step_times.measure import VARIANTS, Row, measure  # noqa: E402
from experiments.lra.step_times.table import markdown  # noqa: E402
from pallas_kernels.records import driver_version, package_versions, write_atomically  # noqa: E402
from pallas_kernels.timing import Effort  # noqa: E402

NAME = "step_times.json"


def here(tiny: bool) -> dict[str, Any]:
    """What the times depend on."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), **package_versions(("jax", "jaxlib", "flax", "optax"))}
    if device.platform == "gpu":
        versions["driver"] = driver_version()
    return {"device": device.device_kind, "platform": device.platform, "versions": versions, "tiny": tiny}


def read(path: Path, about: dict[str, Any]) -> list[Row]:
    """The rows that an earlier call on the same device measured.

    Raises:
      ValueError: if the file is none of this program, or of another device or other versions.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        rows, before = [Row(**row) for row in content["rows"]], {name: content[name] for name in about}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no step times ({error!r}); choose another --out.") from error
    if before != about:
        raise ValueError(f"{path} is of {before}, and this is {about}; choose another --out.")
    return rows


def arguments() -> argparse.Namespace:
    numbered = "\n".join(f"  {number} {variant.label}" for number, variant in enumerate(VARIANTS, 1))
    parser = argparse.ArgumentParser(
        prog="python -m experiments.lra.step_times",
        description=__doc__,
        epilog=f"variants:\n{numbered}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=list(cases()), default=list(cases()), help="default: all")
    numbers = range(1, len(VARIANTS) + 1)
    parser.add_argument("--variants", nargs="+", type=int, choices=numbers, default=list(numbers), help="default: all")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the median counts (default: 7)")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most about so long for a row (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="models of a few features, to try the program")
    options = parser.parse_args()
    for name in ("repeats", "seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0; got {getattr(options, name)}")
    return options


def main() -> None:
    options = arguments()
    if MISSING:
        print(f"without {', '.join(MISSING)}, which steps do not need")
    about = here(options.tiny)
    path = options.out / NAME
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        rows = read(path, about)
        effort = Effort(options.repeats, round_seconds=min(0.3, options.seconds / 3), limit_seconds=options.seconds)
        wanted = [(task, VARIANTS[number - 1]) for task in options.tasks for number in options.variants]
        for task, variant in wanted:
            if any(row.key == (task, variant.architecture, variant.implementation, variant.dtype) for row in rows):
                continue
            case = cases()[task].tiny() if options.tiny else cases()[task]
            row = measure(task, case, variant, effort)
            result = row.reason if row.ms is None else f"{row.ms:.2f} ms"
            print(f"{task}: {variant.label}: {result}", flush=True)
            rows.append(row)
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            content = {**about, "date": date, "rows": [row.as_json() for row in rows]}
            write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        text = markdown(about, rows)
        write_atomically(options.out / "step_times.md", text)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: out must be a folder that can be written to; got {options.out} ({error}).") from error
    print(text)


if __name__ == "__main__":
    main()
