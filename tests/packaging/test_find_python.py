"""The search for an interpreter: PATH, then pyenv, then uv, then one clear sentence."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIND_PYTHON = Path(__file__).resolve().parents[2] / ".ci" / "find_python"


def find_python(path: Path) -> subprocess.CompletedProcess[str]:
    """Runs the search in a world where `path` is all there is."""
    return subprocess.run(
        [shutil.which("sh"), FIND_PYTHON], env={"PATH": str(path)}, capture_output=True, text=True, check=False
    )


def command(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('sh')}\n{body}\n")
    path.chmod(0o755)


def interpreter(path: Path, *, usable: bool = True) -> None:
    """A python that answers like ours, or one that is too old or broken, as the shims of pyenv can be."""
    command(path, f'exec {shlex.quote(sys.executable)} "$@"' if usable else "exit 127")


def test_takes_a_python_from_the_path(tmp_path):
    interpreter(tmp_path / "python3.12", usable=False)
    interpreter(tmp_path / "python3")
    found = find_python(tmp_path)
    assert found.returncode == 0, found.stderr
    assert os.path.samefile(found.stdout.strip(), sys.executable)


def test_takes_a_python_from_pyenv(tmp_path):
    interpreter(tmp_path / "bin" / "python3", usable=False)
    command(tmp_path / "bin" / "pyenv", f"[ $1 = root ] && echo {shlex.quote(str(tmp_path))}")
    interpreter(tmp_path / "versions" / "3.9.1" / "bin" / "python3")  # by its name, not to be tried
    assert find_python(tmp_path / "bin").returncode == 1
    interpreter(tmp_path / "versions" / "3.13.0" / "bin" / "python3")
    assert find_python(tmp_path / "bin").returncode == 0


@pytest.mark.parametrize("installed", [True, False])
def test_takes_a_python_from_uv(tmp_path, installed):
    """Where uv has none yet, it is asked to install one."""
    interpreter(tmp_path / "elsewhere" / "python3.12")
    present = tmp_path / "present"
    if installed:
        present.touch()
    location = shlex.quote(str(tmp_path / "elsewhere" / "python3.12"))
    command(
        tmp_path / "bin" / "uv",
        f'case "$1 $2" in "python find") [ -e {present} ] && echo {location};; "python install") : > {present};; esac',
    )
    found = find_python(tmp_path / "bin")
    assert found.returncode == 0, found.stderr
    assert present.exists()


def test_says_in_one_sentence_that_there_is_none(tmp_path):
    interpreter(tmp_path / "python3", usable=False)
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("error: found no Python >= 3.12")
    assert found.stderr.count("\n") == 1
