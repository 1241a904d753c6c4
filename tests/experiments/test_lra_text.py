"""Text of Long Range Arena: its vocabularies, the published archive, and what is made of it."""

import io
import re
import tarfile
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.common.downloads import Download
from experiments.lra.text import archive, dataset, stand_in, vocabulary
from experiments.lra.text.__main__ import main
from experiments.lra.text.archive import Review
from experiments.lra.text.dataset import Examples
from experiments.lra.text.recipe import PAPER, SMALL, SMOKE, Text

TEXTS = [b"It was good.", "déjà vu <br />".encode(), b"\xff not UTF-8", b""]


# vocabularies


def test_bytes_are_decoded_as_they_were():
    everything = [*TEXTS, bytes(range(256))]
    assert [vocabulary.Bytes().decode(vocabulary.Bytes().encode(text)) for text in everything] == everything


def test_characters_are_decoded_as_they_were():
    counted = vocabulary.counted(TEXTS, least=1)
    assert [counted.decode(counted.encode(text)) for text in TEXTS] == [
        text.decode(errors="replace").encode() for text in TEXTS
    ]
    assert counted.size == 3 + len(set(b"".join(TEXTS).decode(errors="replace")))


def test_rare_characters_are_unknown():
    counted = vocabulary.counted([b"aab", b"ab!"], least=2)
    assert (counted.characters, counted.size) == ("ab", 5)
    assert counted.encode(b"ab!").tolist() == [3, 4, vocabulary.UNKNOWN]
    assert counted.decode(counted.encode(b"ab!")) == "ab\ufffd".encode()


def test_only_what_a_sequence_holds_is_counted():
    assert vocabulary.counted(["ééx".encode()], least=1, most=2).characters == "é"


def test_the_sizes_are_those_of_the_papers_code():
    assert vocabulary.PRINTABLE_ASCII.size == 98
    assert vocabulary.Bytes().size == 259
    assert (vocabulary.PAD, vocabulary.UNKNOWN, vocabulary.END, vocabulary.FIRST) == (0, 1, 2, 3)


@pytest.mark.parametrize("tokens", [vocabulary.Bytes(), vocabulary.counted(["éab".encode()], least=1)])
def test_sequences_are_ended_padded_and_cut(tokens):
    whole = tokens.encode("ééab".encode())
    sequence, count = tokens.sequence("ééab".encode(), 10)
    assert count == len(whole) + 1
    np.testing.assert_array_equal(sequence, [*whole, vocabulary.END, *[vocabulary.PAD] * (9 - len(whole))])
    cut, count = tokens.sequence("ééab".encode(), 3)
    np.testing.assert_array_equal(cut, [*whole[:2], vocabulary.END])
    assert (count, cut.dtype) == (3, tokens.dtype)


def test_many_characters_need_two_bytes():
    tokens = vocabulary.Characters("".join(map(chr, range(100, 400))))
    assert (tokens.dtype, tokens.encode(chr(399).encode()).tolist()) == (np.uint16, [302])


# the archive


def published(folder: Path, reviews: dict[str, bytes], *, mode: str = "w:gz") -> Path:
    """An archive in the form of the published one, with folders and files that are no reviews."""
    path = folder / "aclImdb_v1.tar.gz"
    folder.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name in ("aclImdb", "aclImdb/train", "aclImdb/train/pos"):
            header = tarfile.TarInfo(name)
            header.type = tarfile.DIRTYPE
            file.addfile(header)
        others = {
            "aclImdb/README": b"about",
            "aclImdb/train/unsup/0_0.txt": b"?",
            "aclImdb/train/labeledBow.feat": b"9",
        }
        for name, content in (others | reviews).items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return path


FEW = {
    "aclImdb/test/neg/0_2.txt": b" Dull. \n",
    "aclImdb/test/pos/0_10.txt": b"Great <br /> fun",
    "aclImdb/train/neg/1_1.txt": "très déjà vu".encode(),
    "aclImdb/train/pos/0_7.txt": b"Good\x85",
}
EXPECTED = {
    "train": [Review("très déjà vu".encode(), 0), Review(b"Good\x85", 1)],
    "test": [Review(b"Dull.", 0), Review(b"Great <br /> fun", 1)],
}


@pytest.fixture
def few(tmp_path, monkeypatch) -> Path:
    """A folder with a small archive, which then is the published one."""
    path = published(tmp_path / "data", FEW)
    accept(path, monkeypatch)
    return path.parent


def accept(path: Path, monkeypatch) -> None:
    import hashlib

    content = path.read_bytes()
    accepted = Download("http://127.0.0.1:9/" + path.name, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(archive, "IMDB", accepted)
    monkeypatch.setattr(archive, "REVIEWS", 2)


def test_the_published_file_is_that_of_tensorflow_datasets():
    import tensorflow_datasets

    table = Path(tensorflow_datasets.__file__).parent / "datasets/imdb_reviews/checksums.tsv"
    [url, size, digest, name] = table.read_text().split()
    assert Download(url, int(size), digest) == archive.IMDB
    assert archive.IMDB.name == name


def test_reviews_are_read_with_the_labels_of_their_folders(few):
    assert archive.read(few / "aclImdb_v1.tar.gz") == EXPECTED


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"aclImdb/train/pos/3_2.txt": b"?"},
            r"must have ratings from 7 to 10 in pos; got 'aclImdb/train/pos/3_2\.txt'",
        ),
        ({"aclImdb/test/neg/3_11.txt": b"?"}, "must have ratings from 1 to 4 in neg; got"),
        (
            {"aclImdb/train/pos/9_9.txt": b"?"},
            r"must have 2 reviews in aclImdb/train; got 3\. Remove it and get it again",
        ),
        ({"../escape.txt": b"?"}, r"must hold paths below its own folder alone; got '\.\./escape\.txt'"),
        ({"aclImdb/train/pos/1_8.txt": b"x" * (2**20 + 1)}, "must have members of at most 1,048,576 bytes"),
    ],
)
def test_what_is_wrong_in_the_archive_is_a_sentence(tmp_path, monkeypatch, changes, problem):
    path = published(tmp_path, FEW | changes)
    accept(path, monkeypatch)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {problem}"):
        dataset.prepare(tmp_path, Console(quiet=True))
    assert left(tmp_path) == ["aclImdb_v1.tar.gz"]


def test_another_archive_is_a_sentence_and_writes_nothing(tmp_path):
    path = published(tmp_path, FEW)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must have 84,125,825 bytes; got .*truncated"):
        dataset.prepare(tmp_path, Console(quiet=True))
    assert left(tmp_path) == ["aclImdb_v1.tar.gz"]


def test_a_changed_archive_is_a_sentence(few):
    path = few / "aclImdb_v1.tar.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must have the SHA-256"):
        dataset.prepare(few, Console(quiet=True))
    assert left(few) == ["aclImdb_v1.tar.gz"]


def test_an_archive_that_cannot_be_had_is_a_sentence(few):
    (few / "aclImdb_v1.tar.gz").unlink()
    with pytest.raises(
        ValueError, match=r"must be reachable to get aclImdb_v1\.tar\.gz; .*put it there as .*/aclImdb_v1"
    ):
        dataset.prepare(few, Console(quiet=True))
    assert left(few) == []


def left(folder: Path) -> list[str]:
    """Files, but for empty ones to lock."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )


# the prepared dataset


def all_of(reviews: dataset.Reviews) -> dict[str, list[Review]]:
    return {name: [rows[i] for i in range(len(rows))] for name, rows in reviews._asdict().items()}


def test_reviews_are_written_and_read_back(few):
    folder = dataset.prepare(few, Console(quiet=True))
    assert folder == few / "imdb_text" / "published" / "1.0.0"
    assert all_of(dataset.read(folder)) == EXPECTED
    (few / "aclImdb_v1.tar.gz").unlink()
    assert dataset.prepare(few, Console(quiet=True)) == folder  # and nothing is downloaded


def test_what_tensorflow_datasets_prepared_is_as_good(tmp_path):
    """The folder, the name and the fields of its own builder, which needs TensorFlow to run."""
    import tensorflow_datasets as tfds

    from experiments.common import array_records
    from experiments.lra.text.builder import ImdbText

    class ImdbReviews(ImdbText):
        """As the catalog's."""

    catalog = array_records.make(ImdbReviews, tmp_path, "plain_text")
    assert isinstance(catalog.info.features["text"], tfds.features.Text)
    array_records.write(catalog, {split: [row._asdict() for row in rows] for split, rows in EXPECTED.items()})
    folder = dataset.prepare(tmp_path, Console(quiet=True))
    assert folder == tmp_path / "imdb_reviews/plain_text/1.0.0"
    assert all_of(dataset.read(folder)) == EXPECTED


def test_a_full_disk_leaves_nothing_half(few, monkeypatch):
    from experiments.lra.text.builder import ImdbText

    def fail(self, rows):
        yield 0, next(iter(rows))
        raise RuntimeError("close: No space left on device")

    monkeypatch.setattr(ImdbText, "_generate_examples", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        dataset.prepare(few, Console(quiet=True))
    assert left(few) == ["aclImdb_v1.tar.gz"]
    monkeypatch.undo()


@pytest.mark.parametrize("how", ["missing shard", "cut shard", "no description"])
def test_a_damaged_dataset_is_a_sentence(few, how):
    folder = dataset.prepare(few, Console(quiet=True))
    shard = next(folder.glob("*-train*"))
    if how == "missing shard":
        shard.unlink()
    elif how == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-20])
    else:
        (folder / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))} must be a whole dataset of IMDB .* Remove that"):
        dataset.read(folder)


def test_the_command_prepares(few, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["text", "--data-dir", str(few)])
    main()
    assert f"4 reviews are in {few}/imdb_text/published/1.0.0" in capsys.readouterr().out.replace("\n", "")


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr("sys.argv", ["text", "--data-dir", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=r"^error: .*file"):
        main()


# the stand-in


def test_made_up_reviews_say_what_their_label_says():
    """By an evaluator of its own: each sentence with an opinion, minding `not`."""
    reviews = stand_in.reviews(300, 0, "train", 255)
    for text, label in reviews:
        surplus = 0
        for sentence in text.decode().split("."):
            words = sentence.split()
            opinion = sum((word in stand_in.PRAISE) - (word in stand_in.BLAME) for word in words)
            surplus += -opinion if "not" in words else opinion
        assert surplus != 0
        assert (surplus > 0) == label
    assert sum(label for _, label in reviews) == 150
    assert max(len(text) for text, _ in reviews) <= 255
    assert reviews[:50] == stand_in.reviews(50, 0, "train", 255)
    assert not set(reviews) & set(stand_in.reviews(300, 0, "test", 255))


def test_counting_words_does_not_do():
    """The baseline of the README, 0.63 of 20,000 reviews."""
    reviews = stand_in.reviews(2000, 0, "test", 255)
    right = np.mean([1 - abs(stand_in.naive_label(text) - label) for text, label in reviews])
    assert 0.58 < right < 0.68


# the recipe


def test_the_paper_preset_is_the_authors_recipe():
    # HazyResearch/safari, configs/experiment/lra/long-conv-lra-imdb.yaml and the configs that it builds on.
    assert Text() == PAPER
    assert (PAPER.num_layers, PAPER.features, PAPER.channels, PAPER.max_length) == (6, 256, 2, 4096)
    assert (PAPER.norm, PAPER.prenorm, PAPER.bidirectional, PAPER.dropout_rate) == ("batch", True, False, 0)
    assert (PAPER.kernel_init, PAPER.squash_threshold, PAPER.kernel_dropout_rate) == ("random", 0.003, 0.2)
    assert (PAPER.learning_rate, PAPER.kernel_learning_rate, PAPER.weight_decay) == (0.01, 0.001, 0.05)
    assert (PAPER.warmup_steps, PAPER.decay_steps, PAPER.batch_size) == (5_000, 50_000, 16)
    assert PAPER.steps == archive.REVIEWS // 16 * 32
    assert (PAPER.units, PAPER.rarest, PAPER.source) == ("characters", 15, "imdb")


def test_the_paper_preset_has_the_authors_number_of_parameters():
    model = PAPER.model(135)
    shapes = jax.eval_shape(
        lambda key: model.init(key, np.zeros((1, 4096), np.uint8), deterministic=True), jax.random.key(0)
    )["params"]
    layers = sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"]["layer"]))
    assert round(layers / 1e6, 2) == 14.16
    assert shapes["encoder"]["embedding"].shape == (135, 256)


@pytest.mark.parametrize("units", ["characters", "bytes"])
def test_a_task_reads_the_archive(few, units):
    task = Text(data_dir=few, units=units, rarest=1, max_length=12, batch_size=2).build()
    rows = dict(EXPECTED["train"])
    tokens = vocabulary.Bytes() if units == "bytes" else vocabulary.counted(rows, 1, 11)
    assert task.model.vocab_size == tokens.size
    assert len(task.train) == 2
    for i in range(2):
        example = task.train[i]
        assert example["inputs"].shape == (12,)
        text = next(text for text in rows if tokens.sequence(text, 12)[0].tolist() == example["inputs"].tolist())
        assert example["labels"] == rows[text]
        assert example["lengths"] == tokens.sequence(text, 12)[1]
    assert task.evaluation.keys() == {"test"}


def test_examples_are_random_access():
    examples = Examples(stand_in.reviews(20, 0, "train", 255), vocabulary.Bytes(), 64)
    source = grain.MapDataset.source(examples).seed(0).shuffle().repeat().batch(5)
    assert source[3]["inputs"].shape == (5, 64)
    assert sorted(map(bytes, np.concatenate([source[i]["inputs"] for i in range(4, 8)]))) == sorted(
        bytes(examples[i]["inputs"]) for i in range(20)
    )


def test_presets_have_their_names():
    from experiments.lra.train import RECIPES

    assert RECIPES["text"] == {"paper": PAPER, "small": SMALL, "smoke": SMOKE}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2; got 1"),
        ({"source": "stand-in", "max_length": 100}, "max_length must be at least 101; got 100"),
        ({"rarest": 0}, "rarest must be at least 1; got 0"),
        ({"test_rows": 0}, "test_rows must be at least 1; got 0"),
        ({"data_seed": -1}, "data_seed must be at least 0; got -1"),
    ],
)
def test_options_say_what_they_expect(options, message):
    with pytest.raises(ValueError, match=rf"^{message}\.$"):
        Text(**options)
