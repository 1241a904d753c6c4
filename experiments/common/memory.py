"""How much memory of the devices a program needs."""

from typing import Any

import jax


def step_bytes(compiled: Any) -> int | None:
    """Bytes that a compiled program holds at once on each device, by the compiler's plan; None where it tells none."""
    try:
        needs = compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    if needs is None:
        return None
    held = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    return held + needs.temp_size_in_bytes


def peak_bytes() -> int | None:
    """The most bytes of its first device that this process has held so far; None where the device does not count."""
    counts = jax.local_devices()[0].memory_stats() or {}
    return counts.get("peak_bytes_in_use")
