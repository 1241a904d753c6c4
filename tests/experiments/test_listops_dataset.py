"""ListOps on disk: the generated dataset, what it survives, and the released files."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from rich.console import Console

from experiments.lra.listops import __main__ as command
from experiments.lra.listops import dataset, released, vocabulary
from experiments.lra.listops.dataset import Generated
from experiments.lra.listops.trees import Row, Shape

ROOT = Path(__file__).resolve().parents[2]
SHORT = Shape(min_length=10, max_length=40)
FEW = Generated(seed=3, train_rows=30, validation_rows=8, test_rows=7, shape=SHORT)


def assert_same(first: dataset.Listops, second: dataset.Listops):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.lengths, other.lengths)
        np.testing.assert_array_equal(one.labels, other.labels)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# packing


def row(*words: str, value: int = 0) -> Row:
    return Row(np.array([vocabulary.TEXTS.index(word) for word in words], np.uint8), value)


def test_the_numbers_of_tokens_are_fixed():
    assert vocabulary.SIZE == len(vocabulary.TEXTS) == 18
    assert (vocabulary.PAD, vocabulary.UNKNOWN, vocabulary.END) == (0, 1, 2)
    assert " ".join(vocabulary.TEXTS) == "<pad> <unk> <eos> 0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]"
    for operator, text in (("MIN", "[MIN"), ("MAX", "[MAX"), ("MED", "[MED"), ("SM", "[SM"), ("CLOSE", "]")):
        assert vocabulary.TEXTS[getattr(vocabulary, operator)] == text


def test_rows_are_ended_padded_and_cut():
    rows = [row("[MAX", "1", "8", "]", value=8), row("5", value=5), row("[MIN", "1", "2", "3", "4", "5", "]", value=1)]
    split = dataset.pack(rows, 3, 6)
    np.testing.assert_array_equal(split.tokens, [[14, 4, 11, 17, 2, 0], [8, 2, 0, 0, 0, 0], [13, 4, 5, 6, 7, 2]])
    assert split.lengths.tolist() == [5, 2, 6]
    assert split.labels.tolist() == [8, 5, 1]
    assert (split.tokens.dtype, split.lengths.dtype, split.labels.dtype) == (np.uint8, np.int32, np.int32)


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        ([row("5")], 2, "expected 2 rows, got 1"),
        ([row("5")] * 3, 2, "expected 2 rows, got more"),
        ([], 1, "expected 1 rows, got 0"),
        ([row()], 1, "expected tokens and a value from 0 to 9 in row 1, got 0 and 0"),
        ([row("5", value=10)], 1, "expected tokens and a value from 0 to 9 in row 1, got 1 and 10"),
    ],
)
def test_packing_says_what_it_expects(rows, count, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataset.pack(rows, count, 6)


def test_a_split_is_a_source_of_examples():
    split = dataset.drawn(FEW, 48).train
    assert len(split) == 30
    source = grain.MapDataset.source(split)
    example = source[4]
    assert example.keys() == {"inputs", "lengths", "labels"}
    np.testing.assert_array_equal(example["inputs"], split.tokens[4])
    assert example["lengths"] == split.lengths[4]
    assert example["labels"] == split.labels[4]
    # Every epoch has every row once, in another order, and which ones are in a batch depends on its number alone.
    shuffled = source.seed(0).shuffle().repeat().batch(10)
    epochs = [np.concatenate([shuffled[3 * epoch + batch]["inputs"] for batch in range(3)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, split.tokens))
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(shuffled[5]["inputs"], epochs[1][20:])


# the generated dataset


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    dataset.prepare(folder, FEW)
    return folder


def test_a_dataset_is_written_and_read_back(data_dir):
    splits = dataset.read(data_dir, FEW, 48)
    assert [len(split) for split in splits] == [30, 8, 7]
    assert_same(splits, dataset.drawn(FEW, 48))
    assert splits.train.tokens.shape == (30, 48)
    ends = splits.train.tokens[np.arange(30), splits.train.lengths - 1]
    assert set(ends) == {vocabulary.END}
    assert not (splits.train.tokens == vocabulary.END).sum(-1).max() > 1


def test_no_row_is_in_two_splits():
    splits = dataset.drawn(Generated(0, 400, 300, 300, Shape(min_length=4, max_length=6)), 8)
    tokens = [bytes(row) for split in splits for row in split.tokens]
    assert len(set(tokens)) == len(tokens) == 1000


def test_what_is_there_is_left_alone(data_dir, monkeypatch):
    before = contents(data_dir)
    monkeypatch.setattr(dataset, "_write", None)
    dataset.prepare(data_dir, FEW)
    assert contents(data_dir) == before


def test_it_lies_under_a_name_that_says_everything(data_dir):
    folder = dataset.folder_of(data_dir, FEW)
    assert folder.parent.name == "seed3-rows30_8_7-length10to40-depth10-arguments10"
    assert sorted(path.name for path in data_dir.iterdir()) == ["listops"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", folder.name]


@pytest.mark.parametrize(
    "other",
    [
        Generated(4, 30, 8, 7, SHORT),
        Generated(3, 31, 8, 7, SHORT),
        Generated(3, 30, 9, 7, SHORT),
        Generated(3, 30, 8, 8, SHORT),
        Generated(3, 30, 8, 7, Shape(min_length=11, max_length=40)),
        Generated(3, 30, 8, 7, Shape(min_length=10, max_length=41)),
        Generated(3, 30, 8, 7, Shape(min_length=10, max_length=40, max_depth=9)),
        Generated(3, 30, 8, 7, Shape(min_length=10, max_length=40, max_arguments=9)),
    ],
)
def test_another_dataset_has_another_folder(data_dir, other):
    assert dataset.folder_of(data_dir, other) != dataset.folder_of(data_dir, FEW)


def test_another_size_is_not_answered_with_old_rows(data_dir):
    larger = Generated(3, 33, 8, 7, SHORT)
    dataset.prepare(data_dir, larger)
    assert len(dataset.read(data_dir, larger, 48).train) == 33
    assert len(dataset.read(data_dir, FEW, 48).train) == 30


def test_tensorflow_is_not_needed_and_nothing_is_printed(tmp_path):
    program = f"""
import sys
from pathlib import Path
from experiments.lra.listops import dataset
assert "tensorflow_datasets" not in sys.modules
which = dataset.Generated(3, 30, 8, 7, dataset.Shape(min_length=10, max_length=40))
dataset.prepare(Path({str(tmp_path)!r}), which)
assert len(dataset.read(Path({str(tmp_path)!r}), which, 48).test) == 7
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_dataset_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(
        ValueError, match=r"must be a whole ListOps dataset, but it cannot be read \(.*Remove that folder"
    ):
        dataset.read(tmp_path, FEW, 48)


def damaged(folder: Path, how: str) -> None:
    train = next(folder.glob("listops-train*"))
    if how == "missing shard":
        train.unlink()
    elif how == "cut shard":
        train.write_bytes(train.read_bytes()[: train.stat().st_size // 2])
    elif how == "empty shard":
        train.write_bytes(b"")
    elif how == "missing description":
        (folder / "dataset_info.json").unlink()
    elif how == "cut description":
        (folder / "dataset_info.json").write_text((folder / "dataset_info.json").read_text()[:50])
    elif how == "changed bytes":
        content = bytearray(train.read_bytes())
        for place in range(len(content) // 4, 3 * len(content) // 4, 7):
            content[place] ^= 0xFF
        train.write_bytes(content)
    else:
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    "how",
    [
        "missing shard",
        "cut shard",
        "empty shard",
        "missing description",
        "cut description",
        "changed bytes",
        "nothing in it",
    ],
)
def test_a_damaged_dataset_is_a_sentence(tmp_path, how):
    folder = dataset.prepare(tmp_path, FEW)
    damaged(folder, how)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(folder))} must be a whole ListOps dataset, but .*Remove that"
    ):
        dataset.read(tmp_path, FEW, 48)


def test_rows_of_another_size_under_this_name_are_a_sentence(tmp_path):
    larger = Generated(3, 33, 8, 7, SHORT)
    folder = dataset.prepare(tmp_path, FEW)
    folder.parent.rename(dataset.folder_of(tmp_path, larger).parent)
    with pytest.raises(ValueError, match=r"cannot be read \(.*expected 33 rows, got 30"):
        dataset.read(tmp_path, larger, 48)


@pytest.mark.parametrize("below", ["", "data"])
def test_a_folder_that_cannot_be_is_a_sentence(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ValueError, match=r"/file/.* must be a folder that can be made and written to; got .+\."):
        dataset.prepare(file / below, FEW)
    assert file.read_text() == "precious"


def test_a_folder_of_released_files_is_not_for_generated_rows(tmp_path):
    (tmp_path / "basic_train.tsv").touch()
    with pytest.raises(ValueError, match=r"^data_dir must be a folder for generated rows.*: give it as tsv_dir\.$"):
        dataset.prepare(tmp_path, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["basic_train.tsv"]


def test_a_killed_preparation_is_started_over(tmp_path):
    program = f"""
import time
from pathlib import Path
from experiments.lra.listops import dataset, trees
which = dataset.Generated(3, 30, 8, 7, dataset.Shape(min_length=10, max_length=40))
def slowly(self, rows):
    for number, row in enumerate(rows):
        print(number, flush=True)
        time.sleep(0 if number < 20 else 60)
        yield number, row
from experiments.lra.listops import builder
builder.Listops._generate_examples = slowly
dataset.prepare(Path({str(tmp_path)!r}), which)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            while running.stdout.readline() != "20\n":
                assert running.poll() is None
        finally:
            running.kill()
    folder = dataset.folder_of(tmp_path, FEW)
    assert not folder.exists()
    left = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].startswith("incomplete.")
    dataset.prepare(tmp_path, FEW)
    assert_same(dataset.read(tmp_path, FEW, 48), dataset.drawn(FEW, 48))
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), RuntimeError("close: No space left on device"), KeyboardInterrupt()],
)
def test_a_failing_preparation_leaves_nothing_half(tmp_path, monkeypatch, failure):
    from experiments.lra.listops import builder

    def fail(self, rows):
        yield 0, next(iter(rows))
        raise failure

    monkeypatch.setattr(builder.Listops, "_generate_examples", fail)
    with pytest.raises((ValueError, KeyboardInterrupt)) as caught:
        dataset.prepare(tmp_path, FEW)
    folder = dataset.folder_of(tmp_path, FEW)
    if not isinstance(failure, KeyboardInterrupt):
        reason = r"must be a folder that can be made and written to; got .*No space left on device\. Nothing half"
        assert re.search(f"^{re.escape(str(folder))} {reason}", str(caught.value))
    assert [path.name for path in folder.parent.iterdir()] == [".lock"]


def test_of_two_processes_one_draws(tmp_path):
    command_line = [sys.executable, "-m", "experiments.lra.listops"]
    programs = [
        subprocess.Popen(
            [*command_line, f"--data-dir={tmp_path}", "--train-rows=4000", "--validation-rows=10", "--test-rows=10"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [program.communicate(timeout=100)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert sum(output.count("drawing") for output in outputs) == 1, outputs


# the command


def arguments(*rest: str) -> list[str]:
    sizes = ["--train-rows", "30", "--validation-rows", "8", "--test-rows", "7"]
    return ["listops", *sizes, "--min-length", "10", "--max-length", "40", "--seed", "3", *rest]


def test_command_prepares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", arguments("--data-dir", str(tmp_path), "--workers", "2"))
    command.main()
    output = capsys.readouterr().out
    assert output.startswith("drawing 45 expressions into ")
    assert f"45 rows are in {dataset.folder_of(tmp_path, FEW)}" in output
    assert "\x1b" not in output
    assert_same(dataset.read(tmp_path, FEW, 48), dataset.drawn(FEW, 48))


def test_a_terminal_sees_a_bar(tmp_path):
    output = io.StringIO()
    dataset.prepare(tmp_path, FEW, console=Console(file=output, force_terminal=True, width=100))
    assert "drawing" in output.getvalue()
    assert "writing train" in output.getvalue()
    assert "━" in output.getvalue()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--workers", "0"], r"workers must be at least 1; got 0\."),
        (["--seed", "-1"], r"seed must be at least 0; got -1\."),
        (["--test-rows", "0"], r"test_rows must be at least 1; got 0\."),
        (["--min-length", "50"], r"min_length must be from 1 to max_length = 40; got 50\."),
    ],
)
def test_command_says_in_a_sentence_what_is_wrong(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(sys, "argv", arguments("--data-dir", str(tmp_path), *given))
    with pytest.raises(SystemExit, match=f"^error: {message}$"):
        command.main()


def test_command_has_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["listops", "--help"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data-dir", "--workers", "--seed", "--train-rows", "--max-length", "10 seconds"):
        assert option in text


# the released files


def released_text(tokens: np.ndarray) -> str:
    """An expression as the release has it: each list is opened, and taken by one argument after the other, in pairs."""
    words = iter([vocabulary.TEXTS[token] for token in tokens])

    def node(word: str) -> str:
        if word.isdigit():
            return word
        text = word
        for argument in words:
            if argument == "]":
                return f"( {text} ] )"
            text = f"( {text} {node(argument)} )"
        raise AssertionError("a list without an end")

    return node(next(words))


def released_files(folder: Path, which: Generated) -> Path:
    rows = list(which.draw())
    for name, span in zip(released.FILES, which.spans.values(), strict=True):
        lines = [f"{released_text(row.tokens)}\t{row.value}\n" for row in rows[span]]
        (folder / name).write_text("Source\tTarget\n" + "".join(lines))
    return folder


def test_released_text_is_in_binary_parentheses():
    assert released_text(row("[MED", "1", "2", "]").tokens) == "( ( ( [MED 1 ) 2 ) ] )"


def test_released_files_are_read_as_the_rows_they_were_written_from(tmp_path):
    which = Generated(0, 60, 20, 10)
    assert_same(released.read(released_files(tmp_path, which), 2048), dataset.drawn(which, 2048))


def test_released_files_are_cut_to_the_length_that_fits(tmp_path):
    splits = released.read(released_files(tmp_path, Generated(0, 6, 2, 1)), 512)
    assert splits.train.lengths.max() == 512
    assert (splits.train.tokens[splits.train.lengths == 512, -1] == vocabulary.END).all()


def test_windows_line_ends_are_line_ends(tmp_path):
    folder = released_files(tmp_path, FEW)
    for name in released.FILES:
        path = folder / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert_same(released.read(folder, 48), dataset.drawn(FEW, 48))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("( [MAX 1 ] )", r"expected an expression, a tab and its value; got '\( \[MAX 1 \] \)'"),
        ("( [MAX 1 ] )\t", "expected a value from 0 to 9 behind the tab; got ''"),
        ("( [MAX 1 ] )\t10", "expected a value from 0 to 9 behind the tab; got '10'"),
        ("( [MAX 1 ] )\t1\t2", r"expected a value from 0 to 9 behind the tab; got '1\\t2'"),
        ("( [MAX 1 ] )\tone", "expected a value from 0 to 9 behind the tab; got 'one'"),
        ("( [AVG 1 ] )\t1", r"expected one of 0 1 2 .* \[SM \]; got '\[AVG'"),
        ("( [MAX 12 ] )\t1", "expected one of 0 1 2 .*; got '12'"),
        ("( )\t1", r"expected an expression before the tab; got '\( \)'"),
        ("\t1", "expected an expression before the tab; got ''"),
        ("", "expected an expression, a tab and its value; got ''"),
        ("[MAX \xff ]\t1", "expected one of 0 1 2 .*; got"),
    ],
)
def test_a_malformed_line_is_a_sentence(tmp_path, line, problem):
    folder = released_files(tmp_path, FEW)
    path = folder / "basic_val.tsv"
    lines = path.read_bytes().split(b"\n")
    lines[3] = line.encode("latin-1")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 4: {problem}.*\.$"):
        released.read(folder, 48)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "must have a header and at least one row; got 0 lines"),
        ("Source\tTarget\n", "must have a header and at least one row; got 1 lines"),
        ("[MAX 1 2 ]\t2\n" * 3, r", line 1: expected the header 'Source', tab, 'Target'; got '\[MAX 1 2 \]\\t2'"),
    ],
)
def test_a_malformed_file_is_a_sentence(tmp_path, content, problem):
    folder = released_files(tmp_path, FEW)
    (folder / "basic_test.tsv").write_text(content)
    with pytest.raises(ValueError, match=rf"basic_test\.tsv,? ?{problem}"):
        released.read(folder, 48)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"^tsv_dir must be a folder with .*; got .*nowhere, which lacks basic_train\.tsv"
    ):
        released.read(tmp_path / "nowhere", 48)
    (released_files(tmp_path, FEW) / "basic_val.tsv").unlink()
    with pytest.raises(ValueError, match=r"tsv_dir must be .* such as listops-1000 .*, which lacks basic_val\.tsv\.$"):
        released.read(tmp_path, 48)


def test_reading_is_fast_enough_for_one_gpu():
    """The paper's step takes 6 ms for 50 rows on a fast GPU; three times that rate is 25,000 rows per second."""
    split = dataset.drawn(Generated(0, 5000, 1, 1), 2048).train
    batches = grain.MapDataset.source(split).seed(0).shuffle().repeat().batch(50)
    start = time.perf_counter()
    for number in range(100):
        batches[number]
    assert 5000 / (time.perf_counter() - start) > 5000  # measured 61,000; a fifth of the need, where tests share a core


def test_a_wrong_number_of_workers_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"^workers must be at least 1; got 0\.$"):
        dataset.prepare(tmp_path / "data", Generated(0, 5, 2, 2), workers=0)
    assert not (tmp_path / "data").exists()
