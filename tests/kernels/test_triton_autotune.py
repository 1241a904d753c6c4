"""The timing of plans, as far as it goes without a GPU: what it would time, and that it tells right from wrong."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("Triton is for Linux", allow_module_level=True)

from pallas_kernels.fft_conv import triton_autotune, triton_launch
from pallas_kernels.fft_conv.triton_plans import CARDS, MMA_PLANS
from tests.kernels.triton_interpreter import interpreted

IN_USE = {plan: card for card in CARDS.values() for plan in card.plans}


@pytest.mark.parametrize("plan", triton_autotune.ALTERNATIVES, ids=lambda plan: f"{plan.n1} x {plan.n2}")
def test_alternatives_are_other_plans_of_a_size_that_is_in_use(plan):
    found = triton_autotune.variants(plan)
    assert found.pop("in use") is plan
    assert len({plan, *found.values()}) == 1 + len(found) > 1
    assert all(one.points == plan.points and one.shared <= IN_USE[plan].shared for one in found.values())


def test_only_one_plan_is_there_meanwhile(monkeypatch):
    monkeypatch.setattr(triton_launch, "this_card", lambda: CARDS["9.0"])
    card = triton_autotune.card_at_hand("registers")
    assert card.plans == MMA_PLANS
    plan = dataclasses.replace(MMA_PLANS[0], rows=1)
    with triton_autotune.only(card, plan):
        assert CARDS["9.0"].plans == (plan,)
    assert CARDS["9.0"].plans == triton_autotune.card_at_hand("card").plans != MMA_PLANS


@pytest.mark.slow
@pytest.mark.parametrize("gated", [[], ["--gated"]], ids=["plain", "gated"])
def test_every_alternative_is_timed_and_checked(gated, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_autotune, "seconds_per_call", lambda run, effort: np.array([run(1)]))
    sizes = ["--lengths", "40", "--batch", "3", "--features", "1", "--dtypes", "bfloat16"]
    path = tmp_path / "plans.json"
    with interpreted(card="8.6"):
        assert triton_autotune.main([*sizes, *gated, "--directions", "forward+backward", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["plan"] for row in rows] == ["in use", "stages = 1", "rows = 1", "warps = 8"]
    assert all(row["ms"] > 0 and 1e-3 < row["error"] < 7e-3 for row in rows)


def test_a_plan_that_does_not_compile_ends_no_other(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("out of shared memory\nat length")

    monkeypatch.setattr(triton_autotune, "fft_conv_triton", refuse)
    problem = triton_autotune.Problem(8, "bfloat16", "forward", False, 1, 1)
    found = triton_autotune.measure(problem, [jnp.ones((1, 1, 8))] * 3, (), triton_autotune.Effort())
    assert found == {"failed": "RuntimeError: out of shared memory"}


def test_what_cannot_run_says_so(monkeypatch, capsys, tmp_path):
    def none():
        raise NotImplementedError("JAX finds none")

    monkeypatch.setattr(triton_launch, "this_card", lambda: CARDS["8.6"])
    assert triton_autotune.main(["--lengths", "9000"]) == 2
    assert "at most 8192 steps" in capsys.readouterr().err
    for wrong in (tmp_path / "absent" / "plans.json", tmp_path):
        assert triton_autotune.main(["--out", str(wrong)]) == 2
        assert f"--out must be a file in a folder that exists; got {wrong}" in capsys.readouterr().err
    monkeypatch.setattr(triton_launch, "this_card", none)
    assert triton_autotune.main([]) == 2
    assert "JAX finds none" in capsys.readouterr().err
    for name, value in (("--batch", "0"), ("--seconds", "nan")):
        with pytest.raises(SystemExit):
            triton_autotune.main([name, value])
        assert f"{name} must be positive; got {value}" in capsys.readouterr().err
