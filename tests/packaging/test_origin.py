"""`pallas_kernels` is a name that somebody else may use: ours is found, another one is refused with a clear error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALL = """
import jax.numpy as jnp, flashbutterfly_jax as fb
u = jnp.ones((1, 512), jnp.bfloat16)
print(fb.long_conv(u, u, implementation={implementation!r}).shape)
"""


def call(implementation: str | None, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", CALL.format(implementation=implementation)]
    # In a folder that holds neither: the current one is the first on the import path.
    return subprocess.run(command, cwd=path[0].parent, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A folder with a package of the same name, which must not even be run."""
    (tmp_path / "pallas_kernels").mkdir()
    (tmp_path / "pallas_kernels" / "__init__.py").write_text("raise SystemExit('the stranger was run')")
    return tmp_path


def test_refuses_a_stranger(stranger):
    done = call("mosaic_gpu", stranger, ROOT)
    assert done.returncode == 1
    assert "the stranger was run" not in done.stderr
    message = next(line for line in done.stderr.splitlines() if line.startswith("ImportError: "))
    assert f"needs the pallas_kernels package in {ROOT}" in message
    assert str(stranger / "pallas_kernels") in message


def test_does_without_it_where_no_kernel_is_asked_for(stranger):
    done = call("xla", stranger, ROOT)
    assert done.stdout == "(1, 512)\n", done.stderr


def test_finds_ours():
    done = call(None, ROOT)
    assert done.stdout == "(1, 512)\n", done.stderr
