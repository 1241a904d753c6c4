"""The wheel: what it contains, and that it works on its own from another folder."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that is given no import path but its own."""
    done = subprocess.run(
        command, cwd=cwd, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel, and the libraries of the environment we run in."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    # Only a path is added: .pth files of that environment, such as our own editable install, are not processed.
    libraries = {str(Path(module.__file__).parents[1]) for module in map(__import__, ["jax", "flax"])}
    (site_packages / "libraries.pth").write_text("\n".join(sorted(libraries)))
    return folder / "bin" / "python"


def test_contains_the_two_packages_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"flashbutterfly_jax", "pallas_kernels"}
    assert {"flashbutterfly_jax/py.typed", "pallas_kernels/fft_conv/tuned/nvidia_h200.json"} <= set(names)
    sources = {
        str(path.relative_to(ROOT))
        for package in ("flashbutterfly_jax", "pallas_kernels")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_convolves_from_another_folder(python, tmp_path):
    code = """
import flashbutterfly_jax as fb, pallas_kernels, numpy as np
print(fb.__file__); print(pallas_kernels.__file__)
print(np.allclose(fb.long_conv(np.ones((1, 3)), np.ones((1, 3))), [[1, 2, 3]]))
"""
    ours, kernels, result = run(python, "-c", code, cwd=tmp_path, JAX_PLATFORMS="cpu").splitlines()
    assert Path(ours).is_relative_to(python.parents[1])
    assert Path(kernels).is_relative_to(python.parents[1])
    assert result == "True"


def test_experiments_and_tests_are_not_importable(python, tmp_path):
    code = "import importlib.util as u; print(*map(u.find_spec, ['experiments', 'tests']))"
    assert run(python, "-c", code, cwd=tmp_path).split() == ["None", "None"]


@pytest.mark.parametrize("module", ["flashbutterfly_jax", "pallas_kernels"])
def test_importing_does_no_work(python, tmp_path, module):
    """No device is asked for, no setting of JAX is changed, and Flax is not loaded."""
    code = f"""
import jax, sys
from jax._src import xla_bridge
settings = dict(jax.config.values)
import {module}
print(xla_bridge.backends_are_initialized(), dict(jax.config.values) == settings, 'flax' in sys.modules)
jax.devices()
print(xla_bridge.backends_are_initialized())
"""
    assert run(python, "-c", code, cwd=tmp_path, JAX_PLATFORMS="cpu").split() == ["False", "True", "False", "True"]
