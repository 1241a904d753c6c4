"""Runs of the toy task share their compiled programs: a run then takes 1 second of a core instead of 8."""

import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder for compiled programs of all tests, or a new one, here and in the processes of `toy_process`."""
    options = {
        "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield options
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def toy_run(compiled):
    """Runs the toy task here: the result and the output."""
    from experiments.common.train import train
    from tests.experiments.toy import Toy

    def run(folder, recipe=None, *, devices=1, terminal=False, **options):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=200)
        result = train(recipe or Toy(), folder, devices=jax.devices()[:devices], console=console, **options)
        return result, output.getvalue()

    return run


@pytest.fixture(scope="session")
def toy_process(compiled):
    """Starts the toy task in a process of its own, with one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | {name.upper(): str(value) for name, value in compiled.items()}

    def start(folder, *arguments, prefix=(), **changes):
        command = [
            *prefix,
            sys.executable,
            "-W",
            "error",
            "-m",
            "tests.experiments.toy",
            "--workdir",
            str(folder),
            *arguments,
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def finished(toy_run, tmp_path_factory):
    """The folder, the result and the output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, *toy_run(folder)
