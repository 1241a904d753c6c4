"""Retrieval of Long Range Arena: the released pairs, the stand-in, and the recipe."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.lra.retrieval import released, stand_in
from experiments.lra.retrieval.recipe import PAPER, SMALL, SMOKE, TOKENS, Examples, Retrieval
from experiments.lra.retrieval.released import Pair, Pairs
from experiments.lra.text import vocabulary

PAIRS = [
    Pair((b'a "quoted" title', b"an open \" quote, 'n all"), 1),
    Pair(("naïve Bayes".encode(), b"\xff not UTF-8"), 0),
    Pair((b"", b" spaces stay "), 0),
]


def line(pair: Pair, number: int = 0) -> bytes:
    """As the release has it."""
    return b"\t".join([f"{pair.label}.0".encode(), b"P%d" % number, b"Q", *pair.texts])


def written(folder: Path, content: bytes | None = None) -> Path:
    """The three files; of the content the second."""
    folder.mkdir(exist_ok=True)
    for name in released.FILES:
        (folder / name).write_bytes(b"".join(line(pair, n) + b"\n" for n, pair in enumerate(PAIRS)))
    if content is not None:
        (folder / released.FILES[1]).write_bytes(content)
    return folder


def all_of(pairs: Pairs) -> list[Pair]:
    return [pairs[row] for row in range(len(pairs))]


def test_pairs_are_read_as_they_were_written(tmp_path):
    for pairs in released.read(written(tmp_path)):
        assert all_of(pairs) == PAIRS
        assert pairs.labels.tolist() == [1, 0, 0]


def test_the_last_line_may_lack_its_end_and_lines_may_end_as_on_windows(tmp_path):
    lines = [line(pair) for pair in PAIRS]
    for content in (b"\n".join(lines), b"\r\n".join(lines), b"\r\n".join(lines) + b"\r\n"):
        assert all_of(released.read(written(tmp_path, content))[1]) == PAIRS


def test_fields_are_found_across_blocks(tmp_path, monkeypatch):
    """A file is searched block by block, which may end anywhere."""
    expected = all_of(released.read(written(tmp_path))[1])
    for block in (1, 7, 30):
        monkeypatch.setattr(released, "_BLOCK", block)
        assert all_of(released.read(tmp_path)[1]) == expected


FIELDS = "label, id1, id2, text1, text2, with tabs between"


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (b"1.0\ta\tb\tone text", rf"{FIELDS}; got '1\.0\\ta\\tb\\tone text'"),
        (b"1.0\ta\tb\tone\ttwo\tthree", FIELDS),
        (b"", f"{FIELDS}; got ''"),
        (b"2.0\ta\tb\tone\ttwo", "the label 0.0 or 1.0; got '2.0'"),
        (b"-1.0\ta\tb\tone\ttwo", "the label 0.0 or 1.0; got '-1.0'"),
        (b"label\tid1\tid2\ttext1\ttext2", "the label 0.0 or 1.0; got 'label'"),
    ],
)
def test_a_malformed_line_is_a_sentence(tmp_path, second, problem):
    folder = written(tmp_path, line(PAIRS[0]) + b"\n" + second + b"\n" + line(PAIRS[1]) + b"\n")
    path = re.escape(str(folder / "new_aan_pairs.eval.tsv"))
    with pytest.raises(ValueError, match=f"^{path}, line 2: expected {problem}.*$"):
        released.read(folder)


@pytest.mark.parametrize("kept", [0, 3, -3])
def test_a_truncated_file_is_a_sentence(tmp_path, kept):
    whole = b"".join(line(pair) + b"\n" for pair in PAIRS)
    cut = whole[: len(line(PAIRS[0])) + 1 + kept] if kept >= 0 else whole[: -len(line(PAIRS[2])) + 4]
    if kept == 0:
        cut = b""
    with pytest.raises(
        ValueError, match=r"new_aan_pairs\.eval\.tsv(, line \d: expected label, | must be a readable file)"
    ):
        released.read(written(tmp_path, cut))


def test_missing_files_are_named(tmp_path):
    (written(tmp_path) / "new_aan_pairs.test.tsv").unlink()
    with pytest.raises(ValueError, match=r"^tsv_dir must be .*tsv_data.*lacks new_aan_pairs\.test\.tsv\.$"):
        released.read(tmp_path)


def test_examples_are_two_texts_of_one_length():
    tokens = vocabulary.PRINTABLE_ASCII
    example = Examples(PAIRS, tokens, 12)[0]
    assert (example["inputs"].shape, example["inputs"].dtype) == ((2, 12), np.uint8)
    assert example["lengths"].tolist() == [12, 12]
    assert [tokens.decode(row) for row in example["inputs"]] == [b'a "quoted" ', b'an open " q']
    assert example["labels"] == 1
    assert Examples(PAIRS, tokens, 12)[2]["lengths"].tolist() == [1, 12]
    assert tokens.decode(Examples(PAIRS, tokens, 40)[1]["inputs"][0]) == "na\ufffdve Bayes".encode()


def test_a_task_reads_the_released_files(tmp_path):
    for units in ("characters", "bytes"):
        task = Retrieval(tsv_dir=written(tmp_path), units=units, max_length=16, batch_size=2).build()
        assert task.model.vocab_size == TOKENS[units].size
        assert task.evaluation.keys() == {"validation", "test"}
        assert sorted(int(task.train[i]["labels"]) for i in range(3)) == [0, 0, 1]


def test_made_up_pairs_are_what_their_label_says():
    """By an evaluator of its own: the topic of each paper."""
    pairs = stand_in.pairs(200, 0, "train", 255)

    def topic(text: bytes) -> int:
        [found] = {n for n, words in enumerate(stand_in.TOPICS) for word in text.decode().split() if word in words}
        return found

    assert [int(topic(first) == topic(second)) for (first, second), _ in pairs] == [pair.label for pair in pairs]
    assert sum(pair.label for pair in pairs) == 100
    assert max(len(text) for pair in pairs for text in pair.texts) <= 255
    assert pairs[:20] == stand_in.pairs(20, 0, "train", 255)
    assert not set(pairs) & set(stand_in.pairs(200, 0, "test", 255))


def test_presets_have_their_names():
    from experiments.lra.train import RECIPES

    assert RECIPES["retrieval"] == {"paper": PAPER, "small": SMALL, "smoke": SMOKE}


def test_the_paper_preset_is_the_authors_recipe():
    # HazyResearch/safari, configs/experiment/lra/long-conv-lra-aan.yaml and the configs that it builds on.
    assert Retrieval() == PAPER
    assert (PAPER.num_layers, PAPER.features, PAPER.channels, PAPER.max_length) == (6, 256, 2, 4000)
    assert (PAPER.norm, PAPER.prenorm, PAPER.bidirectional, PAPER.dropout_rate) == ("batch", True, False, 0)
    assert (PAPER.kernel_init, PAPER.squash_threshold, PAPER.kernel_dropout_rate) == ("random", 0.004, 0.1)
    assert (PAPER.learning_rate, PAPER.kernel_learning_rate, PAPER.weight_decay) == (0.01, 0.0001, 0.05)
    assert (PAPER.warmup_steps, PAPER.decay_steps) == (2_500, 50_000)
    assert PAPER.batch_size == 32 * 2  # two batches to a step of the optimiser there
    assert PAPER.steps == 147_086 // 64 * 20
    assert (PAPER.units, PAPER.source) == ("characters", "aan")


def test_the_paper_preset_has_the_authors_number_of_parameters():
    model = PAPER.model()
    shapes = jax.eval_shape(
        lambda key: model.init(key, np.zeros((1, 2, 4000), np.uint8), deterministic=True), jax.random.key(0)
    )["params"]
    layers = sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"]["layer"]))
    assert round(layers / 1e6, 2) == 13.87
    assert shapes["encoder"]["embedding"].shape == (98, 256)
    assert shapes["hidden"]["kernel"].shape == (1024, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2; got 1"),
        ({"source": "stand-in", "max_length": 200}, "max_length must be at least 201; got 200"),
        ({"validation_rows": 0}, "validation_rows must be at least 1; got 0"),
        ({"data_seed": -1}, "data_seed must be at least 0; got -1"),
    ],
)
def test_options_say_what_they_expect(options, message):
    with pytest.raises(ValueError, match=rf"^{message}\.$"):
        Retrieval(**options)
