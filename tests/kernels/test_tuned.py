"""Which configuration a kernel runs with: of the table that ships, of a table of one's own, or by rule."""

import dataclasses
import json
import re

import pytest

from pallas_kernels.fft_conv import autotune, tuned
from pallas_kernels.fft_conv.config import Config, Kernel
from pallas_kernels.fft_conv.heuristic import candidates, fits, heuristic, shared_memory
from tests.kernels import resources
from tests.kernels.programs import PROGRAMS

FACTORS = (16, 32, 64)
RUN = tuned.Run("NVIDIA H200", "2026-11-23", {"jax": "0.11.2"})


def entry(**changes) -> tuned.Entry:
    config = Config(16, 2, 1)
    tried = (tuned.Candidate(config, 0.25, 5e-3), tuned.Candidate(Config(16, 4, 1), failed="its result is wrong"))
    sizes = {"batch": 64, "channels": 1, "features": 768, "length": 1024}
    made = tuned.Entry(Kernel.FORWARD, 16, "bfloat16", config, 0.25, "forward", sizes, tried, 0)
    return dataclasses.replace(made, **changes)


def table(*entries: tuned.Entry) -> tuned.Table:
    return tuned.Table((RUN,), {one.key: one for one in entries})


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("n2", FACTORS)
def test_every_kernel_has_a_configuration_that_fits(kernel, n2):
    for config in (tuned.configuration(kernel, n2, "bfloat16"), heuristic(kernel, n2)):
        assert config.n2 == n2
        assert fits(kernel, config)
        assert config in candidates(kernel, n2)


def test_shared_memory_is_what_the_compiler_says():
    kernels = {kernel.value: kernel for kernel in Kernel}
    programs = [program for program in PROGRAMS if program.name in kernels and isinstance(program.config, Config)]
    rows = [(program, resources.table()[str(program)]) for program in programs]
    assert {kernels[program.name] for program, _ in rows} == set(Kernel)
    for program, row in rows:
        counted = shared_memory(kernels[program.name], program.config)
        assert row["shared"] == counted if program.options else row["shared"] <= counted, str(program)


def test_the_table_that_ships_says_where_its_times_are_from():
    shipped = tuned._table("")
    assert tuned.dump(shipped) == (tuned.resources.files(tuned) / "nvidia_h200.json").read_text()
    for one in shipped.entries.values():
        run = shipped.runs[one.run]
        assert run.device == "NVIDIA H200"
        assert {"jax", "driver"} <= run.versions.keys()
        problem = autotune.Problem(*one.key, one.problem["batch"], one.problem["features"])
        assert autotune.entry(problem, one.candidates, one.run) == one


def test_a_table_survives_its_file():
    written = tuned.dump(table(entry(), entry(n2=32, config=Config(32), candidates=(), ms=None)))
    assert tuned.parse(written, "file") == table(entry(), entry(n2=32, config=Config(32), candidates=(), ms=None))
    assert tuned.dump(tuned.parse(written, "file")) == written


def test_a_table_of_ones_own_takes_the_place_of_ours(tmp_path, monkeypatch):
    own = entry(config=Config(16, 1, 1), candidates=())
    (tmp_path / "own.json").write_text(tuned.dump(table(own)))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "own.json"))
    assert tuned.configuration(Kernel.FORWARD, 16, "bfloat16") == own.config
    assert tuned.configuration(Kernel.FORWARD, 16, "float16") == own.config  # of the other dtype
    assert tuned.configuration(Kernel.FORWARD, 32, "bfloat16") == heuristic(Kernel.FORWARD, 32)
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(
        ValueError, match=r"FFT_CONV_TUNED must name a table .* cannot read .*missing\.json: No such file"
    ):
        tuned.configuration(Kernel.FORWARD, 16, "bfloat16")


def test_the_measured_dtype_comes_before_the_other(tmp_path, monkeypatch):
    half = entry(dtype="float16", config=Config(16, 1, 1), candidates=())
    (tmp_path / "own.json").write_text(tuned.dump(table(entry(), half)))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "own.json"))
    assert tuned.configuration(Kernel.FORWARD, 16, "float16") == half.config
    assert tuned.configuration(Kernel.FORWARD, 16, "bfloat16") == entry().config


def _without(name: str):
    def remove(fields):
        del fields["entries"][0][name]

    return remove


def _with(**changes):
    return lambda fields: fields["entries"][0].update(changes)


WRONG = {
    "no kernel": (_with(kernel="sideways"), "(sideways, n2 = 16, bfloat16): 'sideways' is not a valid Kernel"),
    "no n2": (_without("n2"), "entry 0: 'n2' is missing."),
    "n2": (_with(n2=17), "n2 must be 16, 32 or 64; got 17."),
    "warpgroups": (_with(config={"warpgroups": 9}), "warpgroups must be from 1 to 4; got 9."),
    "no field": (_with(config={"warps": 4}), "unexpected keyword argument 'warps'"),
    "unknown": (_with(speed=4), "unexpected keyword argument 'speed'"),
    "memory": (_with(n2=64, kernel="backward", config={"warpgroups": 4}), "needs more shared memory than a block has."),
    "dtype": (_with(dtype="float32"), "dtype must be one of bfloat16, float16; got 'float32'."),
    "time": (_with(ms=-1.0), "ms must be a positive number; got -1.0."),
    "run": (_with(run=1), "run must be the index of one of 1 runs; got 1."),
    "twice": (lambda fields: fields["entries"].append(fields["entries"][0]), "entry 1 (forward, n2 = 16, bfloat16): a"),
    "no runs": (lambda fields: fields.pop("runs"), "own.json: not a table of configurations (KeyError('runs'))."),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_names_its_file_its_entry_and_a_way_out(name):
    spoil, reason = WRONG[name]
    fields = json.loads(tuned.dump(table(entry())))
    spoil(fields)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        tuned.parse(json.dumps(fields), "own.json")
    message = str(caught.value)
    assert message.startswith("own.json")
    assert message.endswith(
        "Write the file anew with python -m pallas_kernels.fft_conv.autotune, or unset FFT_CONV_TUNED if it names this "
        "file."
    )


def test_half_a_file_is_refused():
    text = tuned.dump(table(entry()))
    with pytest.raises(ValueError, match=r"own\.json: not a table of configurations"):
        tuned.parse(text[: len(text) // 2], "own.json")
