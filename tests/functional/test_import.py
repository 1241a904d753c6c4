"""What importing the library does, in a fresh interpreter each: next to nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import flashbutterfly_jax as fb

ROOT = Path(__file__).resolve().parents[2]


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_device_is_queried():
    """JAX refuses to change the number of devices once it has looked for them."""
    change = "jax.config.update('jax_num_cpu_devices', 3)"
    run(f"import jax, flashbutterfly_jax; {change}; assert len(jax.devices('cpu')) == 3")
    late = f"import jax, flashbutterfly_jax as fb; fb.long_conv([[1.0]], [[1.0]]); {change}"
    with pytest.raises(AssertionError, match="RuntimeError"):
        run(late)


def test_neither_flax_nor_a_kernel_is_imported():
    loaded = run("import sys, flashbutterfly_jax; print(*sys.modules)").split()
    assert "flashbutterfly_jax.functional.long_conv" in loaded
    prefixes = ("flax", "optax", "orbax", "pallas_kernels", "jax.experimental.pallas", "jax.experimental.mosaic")
    backends = ("fused", "mosaic_gpu", "triton", "butterfly.mosaic_gpu")
    ours = tuple(f"flashbutterfly_jax.functional.{name}" for name in backends)
    assert [name for name in loaded if name.startswith((*prefixes, *ours))] == []


def test_no_configuration_is_changed():
    run(
        "import jax\nbefore = dict(jax.config.values)\nimport flashbutterfly_jax\n"
        "assert dict(jax.config.values) == before and before"
    )


def test_exports():
    names = {"functional", "initializers", "kernel_dropout", "long_conv", "smooth", "smooth_frequency", "squash"}
    assert names < set(dir(fb))
    assert {"linen", "nnx", "models", "optim", "interop"} < set(dir(fb))
    with pytest.raises(AttributeError, match="module 'flashbutterfly_jax' has no attribute 'lineen'"):
        fb.lineen  # noqa: B018
