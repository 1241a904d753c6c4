"""The comparison of fixed and learned butterflies: one tiny variant, its record, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.butterfly import compare
from experiments.lra.listops.recipe import SMOKE

TINY = compare.Options(steps=20, batch_size=2, seeds=1, features=2, layers=1)


@pytest.mark.slow
def test_a_variant_trains_and_says_how_well(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "VARIANTS", {"learned": compare.VARIANTS["learned, causal"]})
    options = dataclasses.replace(TINY, out=tmp_path / "new" / "results.json")
    compare.main(options)
    record = json.loads(options.out.read_text())
    result = record["results"]["learned"]
    kernel, blocks, skip, output = 2 * 2 * 64, 2 * 2 * 8**2, 2 * 2, 4 * 4 + 4  # an eighth of 64 steps is one block of 8
    norm, encoder, head = 2 * 2, 2 * 2, 2 * 10 + 10
    assert result["parameters"] == kernel + blocks + skip + output + norm + encoder + head
    assert 0 <= result["accuracy"][0] <= 1
    assert np.isfinite(result["last_losses"]).all()
    assert "learned" in capsys.readouterr().out
    before = options.out.read_text()
    monkeypatch.setattr(compare, "run", None)  # nothing is made again
    compare.main(options)
    assert json.loads(options.out.read_text()) == json.loads(before)


def test_other_options_do_not_go_into_the_same_file(tmp_path):
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"options": compare.settings(TINY), "results": {}}))
    with pytest.raises(SystemExit, match="out must be of the same options"):
        compare.earlier(dataclasses.replace(TINY, out=out, steps=40))
    out.write_text("[1, 2")
    with pytest.raises(SystemExit, match="out must be new or results of this experiment"):
        compare.earlier(dataclasses.replace(TINY, out=out))
    assert compare.earlier(dataclasses.replace(TINY, out=tmp_path / "none.json")) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"side": 4}, "side must be at least 8; got 4"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0; got -1.0"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_the_table_has_means_and_deviations():
    result = {"parameters": 1234, "accuracy": [0.5, 0.7], "last_losses": [1.0, 2.0]}
    console = Console(record=True, width=200)
    console.print(compare.table({"some": result}))
    text = console.export_text()
    assert "1,234" in text
    assert "60.00% ± 14.14%" in text
    assert "1.500" in text


def test_recipes_refuse_a_causal_butterfly_that_is_to_look_ahead():
    with pytest.raises(ValueError, match="butterfly must be right_angle or padded where bidirectional; got causal"):
        dataclasses.replace(SMOKE, butterfly="causal", bidirectional=True)
    with pytest.raises(ValueError, match="butterfly must be None for a baseline; got padded"):
        dataclasses.replace(SMOKE, butterfly="padded", architecture="s5")
    layer = dataclasses.replace(SMOKE, butterfly="right_angle").layer()
    assert layer.keywords["butterfly"].form == "right_angle"
