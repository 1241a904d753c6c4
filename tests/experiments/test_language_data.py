"""From text to windows of tokens: whole on the disk or not there, and wrong files are named."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from experiments.language import corpus as corpora
from experiments.language import tokens as arrays
from experiments.language.corpus import corpus_of, split_of_name, standard_library
from experiments.language.tokenizers import ByteTokenizer, FileTokenizer
from experiments.language.tokens import Tokens, Windows, sliding_windows

BYTES = ByteTokenizer()
TEXTS = {"train": "Ein Käse.\nZwei.", "valid": "drei", "test": "vier vier vier"}


@pytest.fixture
def wikitext(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / f"wiki.{name}.raw").write_text(text)
    (folder / "README").write_text("not part of any split")
    return folder


def tokens_of(folder, tmp_path, tokenizer=BYTES, **options):
    return Tokens.of(corpus_of(folder), tokenizer, tmp_path / "data", **options)


def test_files_named_like_splits_are_the_splits(wikitext, tmp_path):
    tokens = tokens_of(wikitext, tmp_path, separate=False)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert BYTES.decode(tokens[split]).decode() == TEXTS[name]
        assert tokens.info[split].bytes == tokens.info[split].tokens == len(TEXTS[name].encode())
    assert tokens["train"].dtype == np.uint16


def test_documents_are_packed_with_a_separator_after_each(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = {name: [f"{name} {i}" for i in range(3)] for name in ("train", "validation", "test")}
    for name, texts in rows.items():
        table = pyarrow.table({"text": texts, "number": range(3)})
        pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    tokens = tokens_of(folder, tmp_path)
    want = b"".join(text.encode() + b"|" for text in rows["train"])
    assert np.where(tokens["train"] == 256, ord("|"), tokens["train"]).astype(np.uint8).tobytes() == want
    assert (tokens.info["train"].documents, tokens.info["train"].bytes) == (3, len(want) - 3)


def test_json_lines(tmp_path):
    folder = tmp_path / "pile"
    folder.mkdir()
    for name in ("train", "val", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(2)))
    tokens = tokens_of(folder, tmp_path)
    assert BYTES.decode(tokens["validation"]) == b"val0\nval1\n"


def test_other_folders_are_divided_by_document_the_same_way_each_time(tmp_path):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").write_bytes(b"\0")
    for i in range(400):
        (folder / "below" / f"{i}.txt").write_text(f"document {i}")
    documents = list(corpus_of(folder).documents())
    counts = {
        split: sum(document.split == split for document in documents) for split in ("train", "validation", "test")
    }
    assert sum(counts.values()) == 400
    assert counts["train"] > 370
    assert min(counts.values()) >= 2
    assert documents == list(corpus_of(folder).documents())


def test_the_standard_library_is_there():
    corpus = standard_library()
    names = {str(file.relative_to(corpus.root)) for file in corpus.files}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not [name for name in names if "site-packages" in name or "/test/" in name]
    assert {corpora.split_of_hash(f"{name}:0") for name in names} == {"train", "validation", "test"}


@pytest.mark.parametrize("name", ["traing.txt", "latest.raw", "contest-1.txt", "train_and.py"])
def test_names_that_only_look_like_splits(name):
    assert split_of_name(name) in (None, "train" if name.startswith("train_") else None)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "train.txt", r"train\.txt is empty, where text was expected; remove it, or choose files by suffixes\.$"),
        (b"ab\0c", "train.txt", r"train\.txt is not UTF-8 text \(a zero byte at position 2\); convert it"),
        (b"abc\xff", "train.txt", r"train\.txt is not UTF-8 text \(byte 0xff at position 3\); convert it"),
        (b"nothing", "train.parquet", r"train\.parquet is not a parquet file that can be read \("),
        (b'{"text": "a"}\n{"no": 1}\n', "train.jsonl", r"^line 2 of .*train\.jsonl must be a JSON object with text or"),
        (b"[1]\n", "train.jsonl", r"^line 1 of .*train\.jsonl must be a JSON object"),
    ],
)
def test_files_that_are_no_text(wikitext, tmp_path, content, name, message):
    (wikitext / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokens_of(wikitext, tmp_path)
    assert [path.name for path in (tmp_path / "data" / "language").iterdir()] == [".lock"]


def test_parquet_without_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet must have a column text or content; it has words\.$"):
        list(corpus_of(tmp_path / "train.parquet").documents())


def test_paths_without_text(tmp_path):
    with pytest.raises(
        ValueError, match=r"^path must be a file or a folder of text; got .*gone, which is not there\.$"
    ):
        corpus_of(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"which has no file that ends in \.md or \.rst\.$"):
        corpus_of(tmp_path, (".md", ".rst"))


def test_a_split_without_text(tmp_path):
    file = tmp_path / "text" / "one.txt"
    file.parent.mkdir()
    file.write_text("all there is")
    with pytest.raises(ValueError, match=r"must have text for train, validation and test; there is none for "):
        tokens_of(file, tmp_path)


def test_an_interrupted_tokenization_leaves_nothing_that_looks_complete(wikitext, tmp_path, monkeypatch):
    encode, calls = BYTES.encode, []

    def interrupt(self, text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(text)

    with monkeypatch.context() as patched:
        patched.setattr(ByteTokenizer, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokens_of(wikitext, tmp_path)
    assert [path.name for path in (tmp_path / "data" / "language").iterdir()] == [".lock"]
    assert tokens_of(wikitext, tmp_path).info["test"].bytes == len(TEXTS["test"])


def test_tokens_are_made_once_and_again_where_a_file_changes(wikitext, tmp_path, monkeypatch):
    tokens_of(wikitext, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(arrays, "_write", None)
        tokens_of(wikitext, tmp_path)
    (wikitext / "wiki.test.raw").write_text("anders")
    assert BYTES.decode(tokens_of(wikitext, tmp_path)["test"]) == b"anders\n"


def test_compressed_sizes_are_those_of_the_programs(tmp_path):
    import gzip
    import lzma

    folder = tmp_path / "c"
    folder.mkdir()
    test = "so it goes, so it went\n" * 40
    for name, text in (("train", test * 2), ("valid", "x"), ("test", test)):
        (folder / f"{name}.txt").write_text(text)
    info = tokens_of(folder, tmp_path).info
    assert info["test"].gzip == len(gzip.compress(test.encode(), 9))
    assert info["test"].xz == len(lzma.compress(test.encode()))
    assert info["test"].xz_after_train < info["test"].xz
    assert info["train"].gzip is None


def test_windows_are_one_after_the_other():
    windows = Windows(np.arange(11, dtype=np.uint16), 3)
    assert len(windows) == 3
    assert windows[1]["inputs"].tolist() == [3, 4, 5]
    assert windows[1]["labels"].tolist() == [4, 5, 6]
    assert windows[2]["labels"].dtype == np.int32
    assert len(Windows(np.arange(11), 3, at_most=2)) == 2
    assert len(Windows(np.arange(10), 3)) == 3
    with pytest.raises(ValueError, match=r"^length must be below the 11 tokens of each split; got 11: shorten"):
        Windows(np.arange(11), 11)


@pytest.mark.parametrize("count", [2, 5, 9, 10, 11, 40])
@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 2), (4, 1), (5, 3), (50, 7)])
def test_sliding_windows_count_every_token_once(count, length, stride):
    counted = np.zeros(count, int)
    for number, (start, new) in enumerate(sliding_windows(count, length, stride)):
        end = min(start + length, count - 1)
        counted[end - new + 1 : end + 1] += 1
        assert number == 0 or end - new + 1 - start > length - stride
    assert counted.tolist() == [0] + [1] * (count - 1)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    import tokenizers

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["vier vier vier", "Käse"], trainer)
    tokenizer.save(str(path))
    return path


def test_tokens_of_a_tokenizer_json(wikitext, tmp_path, tokenizer_json):
    tokenizer = FileTokenizer(tokenizer_json)
    assert tokenizer.separator == 0
    for text in TEXTS.values():
        assert tokenizer.decode(tokenizer.encode(text.encode())).decode() == text
    tokens = tokens_of(wikitext, tmp_path, tokenizer)
    assert tokens.vocab_size == tokenizer.vocab_size <= 300
    assert tokens["test"][-1] == 0
    assert tokens.info["test"].tokens < tokens.info["test"].bytes == len(TEXTS["test"])


def test_tokenizers_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"^tokenizer must be a tokenizer\.json; got .*gone\.json \(No such file"):
        FileTokenizer(tmp_path / "gone.json")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^tokenizer must be a tokenizer\.json; got .*empty\.json \("):
        FileTokenizer(tmp_path / "empty.json")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the library tokenizers: pip install tokenizers; or leave it out"):
        FileTokenizer(tmp_path / "tokenizer.json")


def test_a_full_disk_is_said_and_nothing_is_kept(wikitext, tmp_path, monkeypatch):
    def full(self, text, tokenizer, separate):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays._Split, "add", full)
    with pytest.raises(ValueError, match=re.escape("No space left on device")):
        tokens_of(wikitext, tmp_path)
    assert [path.name for path in (tmp_path / "data" / "language").iterdir()] == [".lock"]
