"""The benchmark over devices: right rows, what they say is sent, and failures that end up in the record."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import devices
from experiments.benchmarks.cases import Case
from experiments.benchmarks.spreads import SPREADS, Way, draw, sampled, sent_bytes

SMALL = ["--lengths", "64", "--batch", "4", "--features", "8", "--quick"]


def run(tmp_path, *arguments) -> list[dict]:
    devices.main([*SMALL, "--out", str(tmp_path), *arguments])
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("devices_cpu_")
    return json.loads(written.read_text())["rows"]


class Placed:
    """In place of the program that draws: its numbers from NumPy, which take no compiling."""

    def __init__(self, way: Way, case: Case):
        self.way, self.case = way, case

    def compile(self):
        return self

    def __call__(self):
        random = np.random.default_rng(0)
        shapes = {name: x.shape for name, x in jax.eval_shape(functools.partial(draw, self.case)).items()}
        drawn = {name: random.standard_normal(shape).astype(self.case.dtype) for name, shape in shapes.items()}
        return {name: jax.device_put(x, self.way.sharding(name)) for name, x in drawn.items()}


@pytest.fixture
def placed(monkeypatch):
    monkeypatch.setattr(Way, "lowered_draw", lambda way, case: Placed(way, case))


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize(
    "spreads",
    [("data and feature", "by frequencies"), pytest.param(SPREADS[1:], marks=pytest.mark.slow)],
    ids=["two ways", "every way"],
)
def test_every_way_to_spread_is_right_and_compared_with_one_device(spreads, tmp_path, capsys):
    options = ["--directions", "forward+backward", "--protocols", "circular", "--spreads", *spreads]
    rows = run(tmp_path, "--devices", "4", "1", *options)
    assert [(row["devices"], row["spread"]) for row in rows] == [(1, "one"), *((4, spread) for spread in spreads)]
    for row in rows:
        assert row["status"] == "measured", row
        assert row["errors"].keys() == {"y", "u", "kernel"}
        assert 1e-9 < max(row["errors"].values()) < 1e-6, row  # measured 3e-7
        assert row["difference"] < 1e-6
        assert row["speedup"] == rows[0]["ms"] / row["ms"]
        assert (row["sent_bytes"] > 0) == (row["spread"] not in ("one", "feature"))
    captured = capsys.readouterr()
    assert "pretending to be several: says nothing of GPUs" in captured.out
    assert "times say nothing of GPUs" in captured.err


@pytest.mark.usefixtures("placed")
def test_rows_that_fail_are_told_and_the_others_measured(tmp_path, monkeypatch):
    program = Way.program

    def planted(way, case):
        if way.spread == "feature":
            raise RuntimeError("out of memory\nand more")
        if way.spread == "data":
            return lambda inputs: {"y": 0.8 * program(way, case)(inputs)["y"]}
        return program(way, case)

    monkeypatch.setattr(Way, "program", planted)
    arguments = ["--devices", "1", "2", "--directions", "forward", "--features", "5"]
    with pytest.raises(SystemExit, match=r"not the convolution: .*P = 2, data, xla: wrong"):
        run(tmp_path, *arguments, "--spreads", "data", "feature", "by features")
    rows = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert [row["status"] for row in rows] == ["measured", "wrong", "unsupported", "unsupported"]
    assert rows[1]["reason"] == "relative error 0.2"
    assert rows[-1]["reason"] == "2 does not divide D = 5"
    assert Way("by frequencies", 4, "xla").refusal(Case("causal", 24, "float32", "forward", False, 1, 5)) == (
        "16 does not divide L = 24"
    )
    case = Case("causal", 16, "float32", "forward", False, 2, 4)
    way = Way("feature", 2, "xla")
    row = devices.Bench(case, [way], devices.Effort(), threads=1).row(way)
    assert (row.status, row.reason) == ("failed", "RuntimeError: out of memory")


def test_no_row_starts_after_the_time_is_over(tmp_path):
    rows = run(tmp_path, "--seconds", "0", "--devices", "1", "8")
    assert {row["status"] for row in rows} == {"not measured"}
    assert {row["reason"] for row in rows} == {"the 0 s for the whole run were over"}


@pytest.mark.parametrize(
    ("spread", "protocol"),
    [
        ("by features", "circular"),
        ("by frequencies", "causal"),
        pytest.param("by features", "causal", marks=pytest.mark.slow),
        pytest.param("by frequencies", "circular", marks=pytest.mark.slow),
    ],
)
def test_what_is_sent_is_what_the_compiled_program_exchanges(spread, protocol):
    case, way = Case(protocol, 64, "float32", "forward+backward", False, 3, 4), Way(spread, 4, "xla")
    text = way.lowered(case).compile().as_text()
    exchanged = 0
    for operands in re.findall(r"= (.*) all-to-all(?:-start)?\(", text):
        for kind, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", operands):
            exchanged += {"f32": 4, "c64": 8}[kind] * math.prod(int(n) for n in shape.split(","))
    assert sent_bytes(way, case, text) == exchanged * 3 / 4 > 0


def test_the_sum_over_the_batch_is_that_of_the_taps_spectrum():
    case, way = Case("circular", 64, "float32", "forward+backward", False, 4, 6), Way("data and feature", 4, "xla")
    text = way.lowered(case).compile().as_text()
    assert sent_bytes(way, case, text) == 2 * (1 - 1 / 2) * 8 * 6 // 2 * (64 // 2 + 1)


def test_features_are_fetched_from_where_they_lie():
    x = np.arange(4 * 8 * 2, dtype=np.float32).reshape(4, 8, 2)
    placed = jax.device_put(x, Way("data and feature", 4, "xla").sharding("u"))
    assert np.array_equal(sampled(placed, np.array([1, 3, 4])), x[:, [1, 3, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS[1:])
def test_inputs_are_the_same_however_they_are_spread(spread):
    case, way = Case("causal", 64, "bfloat16", "forward+backward", False, 4, 8), Way(spread, 4, "xla")
    features = np.array([0, 3, 6])
    for name, x in way.lowered_draw(case).compile()().items():
        assert x.sharding.is_equivalent_to(way.sharding(name), x.ndim)
        assert len(x.sharding.device_set) == 4
        want = np.asarray(jax.jit(draw, static_argnums=0)(case)[name].astype(jnp.float32))[..., features, :]
        assert np.array_equal(sampled(x, features), want)


def test_defaults_fill_a_gpu_and_can_be_spread_over_eight():
    settings = devices.parse([], gpu=True, most=8)
    assert settings.devices == [1, 2, 4, 8]
    sizes = {}
    for case, ways in devices.cases(settings, gpu=True):
        sizes[case.length] = case.batch, case.features
        assert [way.implementation for way in ways if way.devices == 1] == ["mosaic_gpu", "xla"]
        assert {way.implementation for way in ways if way.spread == "by frequencies"} == {"xla"}
        for way in ways:
            shares = [share if spread in way.spread else 1 for spread, share in (("data", 8), ("feature", 8))]
            assert not case.batch % shares[0]
            assert not case.features % shares[1]
    assert sizes == {8192: (64, 768), 65536: (16, 768), 1048576: (8, 96)}


def test_more_devices_than_there_are_are_refused(capsys):
    with pytest.raises(SystemExit):
        devices.parse(["--devices", "2", "9"], gpu=False, most=8)
    assert "--devices must be at most 8, as many as there are; got 9" in capsys.readouterr().err
