"""Every kernel that ships has been compiled as it is now, and used what it may: checked without a compiler.

`resources.json` holds what the compiler said and the hash of what it compiled; `test_ahead_of_time` compiles again.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from pallas_kernels.fft_conv.config import SHARED_MEMORY_BYTES
from tests.kernels import resources, sources
from tests.kernels.programs import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]


def test_every_program_was_compiled_as_it_is_now():
    outdated = [str(program) for program in resources.outdated(resources.table(), resources.versions())]
    assert not outdated, f"{resources.FILE.name} is older than what ships; {resources.RENEW}"
    assert list(resources.table()) == [str(program) for program in PROGRAMS], resources.RENEW


def test_the_table_was_made_with_the_pinned_compiler():
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert resources.versions() == {name: pins[name] for name in resources.versions()}, resources.RENEW


def test_nothing_spills():
    assert not [name for name, row in resources.table().items() if row["stack"] or row["spilled"]]


def test_the_compiler_had_nothing_else_to_say_and_there_is_room():
    for name, row in resources.table().items():
        assert not row["notes"], name  # that products wait for each other, for one, as registers are short
        assert row["shared"] <= SHARED_MEMORY_BYTES, name
        assert row["registers"] <= 255, name


def test_a_program_missing_or_compiled_from_something_else_is_named():
    known, versions = dict(resources.table()), resources.versions()
    first, second, *_ = PROGRAMS
    del known[str(first)]
    known[str(second)] = known[str(second)] | {"digest": "of something else"}
    assert resources.outdated(known, versions) == [first, second]
    assert resources.outdated(resources.table(), versions | {"jax": "0.0.1"}) == list(PROGRAMS)


def _named(name: str):
    return next(program for program in PROGRAMS if program.name == name)


def test_a_digest_is_of_sources_configuration_and_options():
    program = _named("forward")
    changed = [
        dataclasses.replace(program, config=dataclasses.replace(program.config, warpgroups=1)),
        dataclasses.replace(program, dtype="float16"),
        dataclasses.replace(program, options=True),
        dataclasses.replace(program, builder=_named("forward, two channels").builder),
        dataclasses.replace(program, builder=_named("backward").builder),
    ]
    digests = [sources.digest(one, {}) for one in [program, *changed]]
    assert len(set(digests)) == len(digests)
    assert digests[0] == sources.digest(dataclasses.replace(program, name="renamed"), {})


def test_a_program_is_made_of_all_that_its_kernel_mentions_and_of_no_other_kernel():
    def closure(name: str):
        found = sources.closure("tests.kernels.programs", name)
        return {one.removeprefix("pallas_kernels.fft_conv.") for one in found}

    shared = {"config.Config", "mosaic.by_columns", "mosaic.PIECE", "tables.dft_tables", "tables._scale"}
    forward, backward, spectrum = (closure(name) for name in ("_forward", "_backward", "_spectrum"))
    assert shared <= forward & backward & spectrum
    assert {"tiles.Block", "chain.conj_times"} <= forward & backward
    assert {"chain.correlate", "kernel_sm90.backward"} <= backward - forward
    assert "spectrum_sm90._times_split" in spectrum - forward


def test_comments_docstrings_and_line_breaks_do_not_count():
    plain = "def f(x, y):\n    z = 'kept'\n    return g(x, y, z)\n"
    same = "def f(x, y):  # why\n    'Docstring.'\n\n    z = 'kept'\n    return g(\n        x, y, z  # more\n    )\n"
    other = plain.replace("x, y, z", "y, x, z")
    assert sources.tokens(plain) == sources.tokens(same) != sources.tokens(other)
    assert sources.tokens(plain) != sources.tokens(plain.replace("kept", "changed"))


def test_a_name_that_cannot_be_followed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tests_of_this.py").write_text("import tests.kernels.programs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match="from package import module"):
        sources.closure("tests_of_this", "anything")
