"""What a speed in examples means in tokens and in arithmetic."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from experiments.common.task import Task

# Dense FLOP/s of 16-bit matrix products, from NVIDIA's data sheets, by what the name of the device begins with.
PEAK_FLOP_PER_SECOND = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}


def throughput(task: "Task", examples_per_second: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """Tokens and model FLOP per second, and the fraction of what the devices could do, as far as they are known."""
    measured: dict[str, float] = {}
    if task.tokens_per_example is not None:
        measured["tokens_per_second"] = round(task.tokens_per_example * examples_per_second, 1)
    if task.flop_per_example is not None:
        flop_per_second = task.flop_per_example * examples_per_second
        measured["model_flop_per_second"] = round(flop_per_second)
        peak = peak_flop_per_second(devices)
        if peak is not None:
            measured["model_flop_utilization"] = round(flop_per_second / peak, 4)
    return measured


def peak_flop_per_second(devices: Sequence[jax.Device]) -> float | None:
    """Of all the devices; None where one is not in the table."""
    peaks = [
        next((peak for name, peak in PEAK_FLOP_PER_SECOND.items() if device.device_kind.startswith(name)), None)
        for device in devices
    ]
    return None if None in peaks else sum(peak for peak in peaks if peak is not None)
