"""The benchmark of two-dimensional convolutions: its rival is one, and it writes what it found and why not."""

import json

import numpy as np
import pytest

from experiments.benchmarks import convolution_2d
from tests.functional.test_long_conv_2d import NEITHER, Case, direct_sum


def test_the_rival_is_the_convolution():
    arrays = Case((5, 5), (5, 5), NEITHER).arguments()
    want = direct_sum(**arrays, causal=NEITHER)
    got = convolution_2d.by_rfft2(arrays["u"], arrays["kernel"], fft=np)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_writes_every_row_with_a_time_or_a_reason(tmp_path, capsys):
    out = tmp_path / "images.json"
    rows = convolution_2d.main(["--quick", "--sizes", "4", "--dtypes", "float32", "--out", str(out)])
    written = json.loads(out.read_text())
    assert [row["implementation"] for row in written["rows"]] == ["rfft2", "xla", "mosaic_gpu"] * 2
    for row in rows:
        if row.implementation == "mosaic_gpu":
            assert row.ms is None
            assert "CUDA" in row.reason
        else:
            assert row.ms > 0
            assert row.error < 1e-6
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "8", "0"], "--sizes must be at least 1; got 0"),
        (["--batch", "-1"], "--batch must be at least 1; got -1"),
        (["--out", "nowhere/rows.json"], "--out must be in a folder"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        convolution_2d.main(arguments)
    assert message in capsys.readouterr().err
