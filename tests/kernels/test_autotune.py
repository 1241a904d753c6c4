"""The measuring of configurations, with convolutions of the CPU in the kernels' place."""

import dataclasses
import functools
from collections import Counter

import jax
import numpy as np
import pytest

from pallas_kernels.fft_conv import autotune, tuned
from pallas_kernels.fft_conv.config import Config, Kernel
from pallas_kernels.fft_conv.heuristic import candidates
from tests.parity import direct_gradients, direct_sum

SMALL = autotune.Problem(Kernel.FORWARD, 16, "bfloat16", batch=2, features=3)
RUN = tuned.Run("NVIDIA H200", "2026-11-23", {"jax": "0.11.2", "driver": "580"})


@pytest.mark.parametrize("kernel", Kernel)
def test_a_problem_has_every_result_of_its_kernel(kernel):
    """The reference against the definition; 64 steps are enough of it."""
    problem = autotune.Problem(kernel, 1, "float16", batch=2, features=2)
    arrays = problem.arrays()
    exact = [np.asarray(x, np.float64) for x in arrays]
    gates = {"pre_gate": exact[2], "post_gate": exact[3]} if problem.gated else {}
    results = problem.results(autotune.by_fft, *arrays)
    if not problem.backward:
        wanted = [direct_sum(exact[0], exact[1], **gates)]
    else:
        by_name = direct_gradients(exact[-1], exact[0], exact[1], **gates)
        wanted = [by_name[name] for name in ("u", "kernel", *gates)]
    assert len(results) == len(wanted)
    for got, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())  # gradients are rounded to float16


def programs(problem: autotune.Problem):
    """Right for two configurations, wrong or without a program for the others."""
    right = jax.jit(functools.partial(problem.results, autotune.by_fft))
    for number, config in enumerate(candidates(problem.kernel, problem.n2)):
        if number < 2:
            yield config, right
        elif number == 2:
            yield config, lambda *arrays: jax.tree.map(lambda x: 1.1 * x, right(*arrays))
        elif number == 3:
            yield config, lambda *arrays: jax.tree.map(lambda x: np.nan * x, right(*arrays))
        else:
            yield config, ValueError("too many registers\nand more")


def test_of_those_as_fast_the_one_with_fewest_warpgroups_wins():
    times = {(4, 2): 1.0, (3, 2): 1.009, (3, 1): 1.004, (2, 1): 1.02}
    tried = [autotune.Candidate(Config(16, *config), ms, 0.005) for config, ms in times.items()]
    found = autotune.entry(SMALL, tried, 0)
    assert (found.config, found.ms) == (Config(16, 3, 1), 1.004)
    assert [one.ms for one in found.candidates] == sorted(times.values())


def test_what_is_wrong_or_does_not_compile_cannot_win():
    tried = list(autotune.measure(SMALL, dict(programs(SMALL)), seconds=0.01))
    assert Counter(one.failed for one in tried) == {
        None: 2,
        "its result is wrong": 2,
        "ValueError: too many registers": 4,
    }
    assert {one.config for one in tried} == set(candidates(Kernel.FORWARD, 16))
    found = autotune.entry(SMALL, tried, 0)
    assert found.ms in {one.ms for one in tried if one.failed is None}
    assert tuned.parse(tuned.dump(tuned.Table((RUN,), {found.key: found})), "file").entries == {found.key: found}
    assert autotune.entry(SMALL, [one for one in tried if one.failed], 0) is None


@pytest.fixture
def options(tmp_path):
    options = ["--kernels", "forward", "backward", "--n2", "16", "32", "--dtypes", "float16", "--batch", "8"]
    return autotune._options([*options, "--out", str(tmp_path / "table.json")])


@pytest.fixture
def measured(monkeypatch):
    """Problems that were measured, in order; each takes 1 ms with four warpgroups, 4 ms with one."""
    seen: list[autotune.Problem] = []

    def measure(problem, programs, seconds):
        seen.append(problem)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [tuned.Candidate(config, 4.0 / config.warpgroups, 5e-4) for config in programs]

    def compile_all(wanted, blocks, workers):
        return {problem: dict.fromkeys(candidates(problem.kernel, problem.n2, blocks)) for problem in wanted}

    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr(autotune, "compile_all", compile_all)
    return seen


def test_a_run_that_was_ended_goes_on_where_it_stopped(options, measured, capsys):
    with pytest.raises(KeyboardInterrupt):
        autotune.tune(options, tuned.Table((), {}), RUN, 114)
    kept = tuned.parse(options.out.read_text(), "table.json")
    assert list(kept.entries) == [problem.key for problem in measured[:2]]
    later = dataclasses.replace(RUN, date="2026-11-24")
    table = autotune.tune(options, kept, later, 114)
    assert measured[3:] == autotune.problems(options)[2:]
    assert len(table.runs) == 1
    assert tuned.parse(options.out.read_text(), "table.json") == table
    assert autotune.tune(options, table, later, 114) == table
    assert "0 to measure, 4 already in" in capsys.readouterr().out
    assert table.entries[Kernel.FORWARD, 16, "float16"].config == Config(16, 4, 2, blocks=114)
    assert [path.name for path in options.out.parent.iterdir()] == ["table.json"]
    rows = autotune.report(table).splitlines()
    assert len(rows) == 5
    assert rows[1].split() == ["forward", "1024", "float16", "4", "2", "1.0000", "4.0000", "5.0e-04"]


def test_what_was_measured_with_other_versions_is_measured_again(options, measured):
    options.kernels, measured[:] = ["forward"], [SMALL] * 3
    old = autotune.tune(options, tuned.Table((), {}), RUN, 132)
    new = autotune.tune(options, old, dataclasses.replace(RUN, versions={"jax": "0.12"}), 132)
    assert measured[3:] == autotune.problems(options) * 2
    assert [run.versions["jax"] for run in tuned.parse(options.out.read_text(), "table.json").runs] == ["0.12"]
    assert new.entries.keys() == old.entries.keys()
    options.batch = 4  # another problem
    autotune.tune(options, new, dataclasses.replace(RUN, versions={"jax": "0.12"}), 132)
    assert measured[7:] == autotune.problems(options)


def test_the_configuration_under_test_is_the_one_that_is_lowered():
    modules = [autotune.lower(SMALL, Config(16, groups, blocks=2)).mlir_module_serialized for groups in (1, 2)]
    assert modules[0] != modules[1]
    assert tuned.configuration(Kernel.FORWARD, 16, "bfloat16").blocks == 132


def test_a_dry_run_lists_every_candidate(capsys):
    assert autotune.main(["--dry-run", "--kernels", "backward", "--n2", "64", "--dtypes", "float16"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(
            f"backward, L = 4096, float16: {config.warpgroups} warpgroups, {config.spectrum_slots} slots"
            for config in candidates(Kernel.BACKWARD, 64)
        ),
        "6 configurations of 1 kernels, sizes and dtypes",
    ]


def test_without_a_gpu_it_says_so(capsys):
    assert autotune.main([]) == 2
    assert capsys.readouterr().err == (
        "autotune: JAX finds no CUDA device here; --dry-run lists what would be timed.\n"
    )


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--batch", "-1"], ["--kernels", "sideways"], ["--n2", "17"]])
def test_a_wrong_option_is_refused(wrong):
    with pytest.raises(SystemExit):
        autotune.main(wrong)
