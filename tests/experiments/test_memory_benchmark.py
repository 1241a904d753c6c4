"""The benchmark of memory: programs that exist without a GPU, tables, and a refusal without the compiler's packages."""

import jax
import pytest

from experiments.benchmarks import hopper, memory
from experiments.benchmarks.memory import Row

GB = 10**9


def test_tables_compare_with_jnp_fft():
    rows = [
        Row("forward", "jnp_fft", 4096, peak_bytes=4 * GB),
        Row("forward", "mosaic_gpu", 4096, peak_bytes=GB // 2),
        Row("forward", "mosaic_gpu", 99999, reason="too long"),
        Row("training", "xla", 65536, peak_bytes=84 * GB),
    ]
    text = memory.markdown(rows)
    assert "| 4,096 | 4 | 0.5 (1 / 8.0) |" in text
    assert "| 99,999 | not compiled | not compiled |" in text
    assert "| 65,536 | 84 |" in text
    assert text.endswith("Not compiled: forward, mosaic_gpu, 99,999: too long.")


@pytest.mark.parametrize("program", memory.PROGRAMS)
def test_programs_are_of_the_shapes_named(program):
    if program == "training":
        step, arguments = memory.training("xla", 64, 2, 8)
        params, _, loss = jax.eval_shape(step, *arguments)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), arguments[0]
        )
        assert params["blocks"]["layer"]["kernel"].shape == (memory.LAYERS, 2, 8, 64)
        assert loss.shape == ()
    else:
        function, arguments = memory.convolution(program, "jnp_fft", 64, 2, 8)
        results = jax.tree.leaves(jax.eval_shape(function, *arguments))
        shapes = [(2, 8, 64)] if program == "forward" else [(2, 8, 64), (2, 8, 64), (8, 64)]
        assert [x.shape for x in results] == shapes


def test_what_compiles_last_and_what_not_at_all(monkeypatch):
    settings = memory.parse(["--lengths", "64", "--implementations", "mosaic_gpu", "jnp_fft"])
    assert list(memory.cases(settings)) == [
        ("forward", "jnp_fft", 64),
        ("forward+backward", "jnp_fft", 64),
        ("forward", "mosaic_gpu", 64),
        ("forward+backward", "mosaic_gpu", 64),
        ("training", "mosaic_gpu", 65536),
    ]
    monkeypatch.setattr(hopper, "WHEELS", ("no-such-package",))
    with pytest.raises(SystemExit, match="needs the cuda-aot extra: no-such-package not installed"):
        memory.main([])


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    if hopper.missing():
        pytest.skip("needs the cuda-aot extra")
    arguments = ["--lengths", "256", "--training-lengths", "256", "--batch", "2", "--features", "8"]
    memory.main([*arguments, "--implementations", "jnp_fft", "xla", "--out", str(tmp_path)])
    assert "| 256 | " in capsys.readouterr().out
    assert len(list(tmp_path.glob("memory_nvidia_h200_*.json"))) == 1
