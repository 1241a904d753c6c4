"""What lies at the top level, and that no file points at a download address."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {".ci", "experiments", "flashbutterfly_jax", "pallas_kernels", "tests"}
FILES = {".gitignore", ".python-version", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
REGISTRY_ADDRESS = re.compile(r"(?i)\b(pypi\.org|pythonhosted\.org|conda\.anaconda\.org|--(?:extra-)?index-url)")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_top_level(tracked):
    assert {path.parts[0] for path in tracked if len(path.parts) > 1} == FOLDERS
    assert {path.name for path in tracked if len(path.parts) == 1} == FILES


def test_no_file_names_a_registry(tracked):
    this_file = Path(__file__).resolve().relative_to(ROOT)
    texts = {path: (ROOT / path).read_text(errors="replace") for path in tracked if path != this_file}
    assert {path for path, text in texts.items() if REGISTRY_ADDRESS.search(text)} == set()


def test_constraints_are_exact_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert "jax==0.11.2" in pins


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        requirements += extra
    names = {normal(re.split(r"[\[<>=]", requirement)[0]) for requirement in requirements} - {"flashbutterfly-jax"}
    pinned = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names - pinned == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
