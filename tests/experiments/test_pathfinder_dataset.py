"""Pathfinder on disk: generated images, what they survive, and the released ones."""

import io
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments.common import array_records, preparation
from experiments.common.splits import random_split
from experiments.lra.pathfinder import __main__ as command
from experiments.lra.pathfinder import dataset, images, released
from experiments.lra.pathfinder.dataset import Generated
from experiments.lra.pathfinder.design import Design

ROOT = Path(__file__).resolve().parents[2]
EASY = Design(32, "curv_baseline")
FEW = Generated(EASY, 3, 30, 8, 7)


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other)
        for row in range(len(one)):
            np.testing.assert_array_equal(one[row]["inputs"], other[row]["inputs"])
            assert one[row]["labels"] == other[row]["labels"]


# generated


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    dataset.prepare(folder, FEW)
    return folder


@pytest.fixture(scope="module")
def in_memory():
    return dataset.drawn(FEW)


def test_images_are_written_and_read_back(data_dir, in_memory):
    splits = dataset.splits(FEW, data_dir=data_dir)
    assert [len(split) for split in splits] == [30, 8, 7]
    assert_same(splits, in_memory)
    first = next(images.rows(3, EASY))
    np.testing.assert_array_equal(splits.train[0]["inputs"].reshape(32, 32), first.image)
    assert splits.train[0]["labels"] == first.label


def test_large_sets_are_read_row_by_row(data_dir, in_memory, monkeypatch):
    monkeypatch.setattr(dataset, "IN_MEMORY", 0)
    splits = dataset.splits(FEW, data_dir=data_dir)
    assert isinstance(splits.train, dataset.Records)
    assert_same(splits, in_memory)
    source = grain.MapDataset.source(splits.train).seed(0).shuffle().repeat().batch(10)
    batch = source[4]  # of the second epoch
    assert (batch["inputs"].shape, batch["inputs"].dtype) == ((10, 1024, 1), np.uint8)
    assert (batch["labels"].shape, batch["labels"].dtype) == ((10,), np.int32)


def test_examples_in_memory_have_the_same_shapes(in_memory):
    batch = grain.MapDataset.source(in_memory.test).batch(7)[0]
    assert (batch["inputs"].shape, batch["inputs"].dtype) == ((7, 1024, 1), np.uint8)
    assert (batch["labels"].shape, batch["labels"].dtype) == ((7,), np.int32)


def test_pixels_become_numbers_from_minus_one_to_one():
    pixels = np.arange(256, dtype=np.uint8)
    expected = (pixels.astype(np.float64) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(jax.jit(dataset.normalize)(pixels), expected, atol=2e-7)  # measured 6e-8


def test_a_split_does_not_depend_on_the_size_of_another(in_memory):
    other = dataset.drawn(Generated(EASY, 3, 31, 8, 7))
    assert_same(other[1:], in_memory[1:])


def test_every_choice_has_another_folder():
    others = [
        Generated(EASY, 4, 30, 8, 7),
        Generated(EASY, 3, 31, 8, 7),
        Generated(EASY, 3, 30, 9, 7),
        Generated(EASY, 3, 30, 8, 8),
        Generated(Design(64, "curv_baseline"), 3, 30, 8, 7),
        Generated(Design(32, "curv_contour_length_9"), 3, 30, 8, 7),
        Generated(Design(32, "curv_baseline", distractors=3), 3, 30, 8, 7),
    ]
    folders = {dataset.folder_of(Path("data"), which.design.size, which.name) for which in [FEW, *others]}
    assert len(folders) == 8


def test_what_is_there_is_left_alone(data_dir, monkeypatch):
    monkeypatch.setattr(array_records, "write", None)
    dataset.prepare(data_dir, FEW)
    assert sorted(path.name for path in (data_dir / "pathfinder32" / FEW.name).iterdir()) == [".lock", images.VERSION]


def test_tensorflow_is_not_needed_and_nothing_is_printed(tmp_path):
    program = f"""
import sys
from pathlib import Path
from experiments.lra.pathfinder import dataset
from experiments.lra.pathfinder.design import Design
assert "tensorflow_datasets" not in sys.modules
which = dataset.Generated(Design(32, "curv_baseline"), 3, 30, 8, 7)
assert len(dataset.splits(which, data_dir=Path({str(tmp_path)!r})).test) == 7
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("how", ["missing", "cut", "changed", "description"])
def test_a_damaged_dataset_is_a_sentence(tmp_path, how, data_dir):
    source = dataset.folder_of(data_dir, 32, FEW.name)
    folder = dataset.folder_of(tmp_path, 32, FEW.name)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = next(folder.glob("*-train*"))
    content = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
    elif how == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        for place in range(len(content) // 4, 3 * len(content) // 4, 7):
            content[place] ^= 0xFF
        shard.write_bytes(content)
    else:
        (folder / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))} must be a whole Pathfinder dataset.*Remove that"):
        dataset.splits(FEW, data_dir=tmp_path)


def test_rows_of_another_number_under_this_name_are_a_sentence(tmp_path, data_dir):
    other = Generated(EASY, 3, 33, 8, 7)
    folder = dataset.folder_of(tmp_path, 32, other.name)
    folder.mkdir(parents=True)
    for path in dataset.folder_of(data_dir, 32, FEW.name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"cannot be read \(expected 33 rows of train, got 30\)"):
        dataset.splits(other, data_dir=tmp_path)


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), RuntimeError("close: No space left on device"), KeyboardInterrupt()],
)
def test_a_failing_preparation_leaves_nothing_half(tmp_path, monkeypatch, failure):
    def fail(*arguments, **options):
        yield images.Row(np.zeros((32, 32), np.uint8), 0)
        raise failure

    monkeypatch.setattr(images, "rows", fail)
    with pytest.raises((ValueError, KeyboardInterrupt)) as caught:
        dataset.prepare(tmp_path, FEW)
    folder = dataset.folder_of(tmp_path, 32, FEW.name)
    if not isinstance(failure, KeyboardInterrupt):
        assert re.search(rf"^{re.escape(str(folder))} must be .*No space left on device\. Nothing", str(caught.value))
    assert [path.name for path in folder.parent.iterdir()] == [".lock"]


def test_what_a_kill_left_behind_is_removed(tmp_path):
    folder = tmp_path / "set" / "1.0.0"
    left = folder.with_name("incomplete.ABC_1.0.0")
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    preparation.prepared(folder, folder.mkdir)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "1.0.0"]


def test_of_two_one_writes_while_the_other_waits(tmp_path):
    folder = tmp_path / "set" / "1.0.0"
    started, may_end = threading.Event(), threading.Event()
    calls = []

    def write() -> None:
        calls.append(1)
        started.set()
        assert may_end.wait(60)
        folder.mkdir()

    output = io.StringIO()
    first = threading.Thread(target=preparation.prepared, args=(folder, write))
    second = threading.Thread(target=preparation.prepared, args=(folder, write, Console(file=output, width=300)))
    first.start()
    assert started.wait(60)
    second.start()
    while "waiting for the process that prepares" not in output.getvalue():
        time.sleep(0.01)
    may_end.set()
    first.join(60)
    second.join(60)
    assert calls == [1]


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match=r"^.*file.* must be a folder that can be made and written to; got Not a dir"):
        dataset.prepare(tmp_path / "file", FEW)
    with pytest.raises(ValueError, match=r"^workers must be at least 1; got 0\.$"):
        dataset.prepare(tmp_path / "data", FEW, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# the command


def test_command_prepares(tmp_path, monkeypatch, capsys, in_memory):
    rows = ["--train-rows", "30", "--validation-rows", "8", "--test-rows", "7", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["x", *rows, "--difficulty", "curv_baseline", "--data-dir", str(tmp_path)])
    command.main()
    output = capsys.readouterr().out
    assert output.startswith("drawing 45 images of 32 × 32 pixels into ")
    assert f"45 images are in {dataset.folder_of(tmp_path, 32, FEW.name)}" in output
    assert_same(dataset.splits(FEW, data_dir=tmp_path), in_memory)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--workers", "0"], r"workers must be at least 1; got 0\."),
        (["--seed", "-1"], r"seed must be at least 0; got -1\."),
        (["--test-rows", "0"], r"test_rows must be at least 1; got 0\."),
        (["--distractors", "-2"], r"distractors must be at least 0; got -2\."),
    ],
)
def test_command_says_in_a_sentence_what_is_wrong(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(sys, "argv", ["x", "--data-dir", str(tmp_path), *given])
    with pytest.raises(SystemExit, match=f"^error: {message}$"):
        command.main()


# released: small releases in the original's format

ROWS = 24


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures():
    """As many as the files of two batches hold, in the order of the tables."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (ROWS, 32, 32), np.uint8), rng.integers(0, 2, ROWS)


def release_files(pictures, *, array: bool = False) -> dict[str, bytes]:
    """By their paths in the archive; the batches are named so that their order as text is not that of their numbers."""
    below = "lra_release/lra_release/pathfinder32/curv_contour_length_14"
    files = {}
    for batch, rows in (("2", range(ROWS // 2)), ("10", range(ROWS // 2, ROWS))):
        table = []
        for number, row in enumerate(rows):
            table.append([f"imgs/{batch}", f"sample_{number}.png", number, pictures[1][row], 1.0, 14, 4, 2, 0.5, 1, 1])
            files[f"{below}/imgs/{batch}/sample_{number}.png"] = png(pictures[0][row])
        if array:
            saved = io.BytesIO()
            np.save(saved, np.array(table))
            files[f"{below}/metadata/{batch}.npy"] = saved.getvalue()
        else:
            text = "".join(" ".join(map(str, fields)) + "\n" for fields in table)
            files[f"{below}/metadata/{batch}.npy"] = text.encode()
    return files


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "lra_release/lra_release"


def packed(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "lra_release.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**files, "lra_release/lra_release/tsv_data/other.tsv": b"x" * 9000}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def assert_released(splits, pictures) -> None:
    for split, numbers in zip(splits, random_split((20, 2, 2)), strict=True):
        assert len(split) == len(numbers)
        for row, number in enumerate(numbers):
            np.testing.assert_array_equal(split[row]["inputs"].reshape(32, 32), pictures[0][number])
            assert split[row]["labels"] == pictures[1][number]


@pytest.mark.parametrize("array", [False, True])
def test_the_unpacked_release_is_read(tmp_path, pictures, array):
    release = unpacked(tmp_path, release_files(pictures, array=array))
    assert_released(released.splits(release, data_dir=tmp_path / "data"), pictures)


def test_the_archive_is_read_once(tmp_path, pictures):
    archive = packed(tmp_path, release_files(pictures))
    assert_released(released.splits(archive, data_dir=tmp_path / "data"), pictures)
    size = archive.stat().st_size
    archive.write_bytes(bytes(archive.read_bytes()[: size // 2]) + b"\0" * (size - size // 2))
    assert archive.stat().st_size < 2**20  # so that its digest changes with any byte
    with pytest.raises(ValueError, match=r"lra_release\.gz must be a whole tar archive"):
        released.splits(archive, data_dir=tmp_path / "data")


def test_a_second_start_does_not_read_the_images(tmp_path, pictures, monkeypatch):
    release = unpacked(tmp_path, release_files(pictures))
    released.splits(release, data_dir=tmp_path / "data")
    monkeypatch.setattr(released, "picture", None)
    assert_released(released.splits(release, data_dir=tmp_path / "data"), pictures)


def test_another_release_is_not_taken_for_this_one(tmp_path, pictures):
    files = release_files(pictures)
    released.splits(unpacked(tmp_path / "a", files), data_dir=tmp_path / "data")
    flipped = pictures[0], 1 - pictures[1]
    other = unpacked(tmp_path / "b", release_files(flipped))
    assert_released(released.splits(other, data_dir=tmp_path / "data"), flipped)


IMAGE = "lra_release/lra_release/pathfinder32/curv_contour_length_14/imgs/10/sample_4.png"
TABLE = "lra_release/lra_release/pathfinder32/curv_contour_length_14/metadata/10.npy"


def test_an_empty_image_is_left_out_and_named(tmp_path, pictures):
    files = release_files(pictures) | {IMAGE: b""}
    release = unpacked(tmp_path, files)
    output = io.StringIO()
    splits = released.splits(release, data_dir=tmp_path / "data", console=Console(file=output, width=500))
    assert "left out 1 of 24 images that are empty files: " in output.getvalue()
    assert str(tmp_path / IMAGE) in output.getvalue()
    assert [len(split) for split in splits] == [19, 2, 2]
    seen = {split[row]["inputs"].tobytes() for split in splits for row in range(len(split))}
    assert seen == {pictures[0][row].tobytes() for row in range(ROWS) if row != 12 + 4}


def changed_table(files: dict[str, bytes], old: bytes, new: bytes) -> dict[str, bytes]:
    lines = files[TABLE].splitlines()
    lines[4] = lines[4].replace(old, new)
    return files | {TABLE: b"\n".join(lines)}


@pytest.mark.parametrize("form", [unpacked, packed])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda files: files | {IMAGE: files[IMAGE][:200]}, r"imgs/10/sample_4\.png must be a gray image of 32 × 32"),
        (lambda files: files | {IMAGE: b"\0" * 300}, r"imgs/10/sample_4\.png must be a gray image.*\(cannot identify"),
        (
            lambda files: files | {IMAGE: png(np.zeros((64, 64), np.uint8))},
            r"imgs/10/sample_4\.png must be .*the mode L and 64 × 64 pixels",
        ),
        (
            lambda files: files | {IMAGE: png(np.zeros((32, 32, 3), np.uint8))},
            r"imgs/10/sample_4\.png must be .*the mode RGB and 32 × 32 pixels",
        ),
        (
            lambda files: {name: content for name, content in files.items() if name != IMAGE},
            r"imgs/10/sample_4\.png must be an image, since metadata/10\.npy lists it; got No such",
        ),
        (
            lambda files: changed_table(files, b"sample_4.png 4 ", b"sample_4.png 4 2"),
            r"metadata/10\.npy, line 5: the label must be 0 or 1; got '2[01]'",
        ),
        (lambda files: changed_table(files, b"imgs/10", b"../../10"), r"10\.npy, line 5: the image must be below the"),
        (lambda files: changed_table(files, b"imgs/10", b"/etc"), r"10\.npy, line 5: the image must be below the"),
        (lambda files: files | {TABLE: b"\x93NUMPY\x01\0cut"}, r"metadata/10\.npy must be a whole table"),
        (lambda files: files | {TABLE: b"imgs/10 a.png\n"}, r"metadata/10\.npy, line 1: expected a folder, a file"),
    ],
)
def test_bad_files_are_named_and_nothing_is_kept(tmp_path, pictures, form, change, problem):
    release = form(tmp_path, change(release_files(pictures)))
    with pytest.raises(ValueError, match=problem):
        released.splits(release, data_dir=tmp_path / "data")
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.name != ".lock"] == []


def test_a_pickle_is_not_opened(tmp_path, pictures):
    saved = io.BytesIO()
    np.save(saved, np.array([["imgs/0", 1, None, {}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"^0\.npy must be a whole table.*allow_pickle"):
        released.parse(saved.getvalue(), "0.npy")
    numbers = io.BytesIO()
    np.save(numbers, np.zeros(3))
    with pytest.raises(ValueError, match=r"^0\.npy must be a table of strings; got an array of shape \(3,\)"):
        released.parse(numbers.getvalue(), "0.npy")


def test_the_layout_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"^release must be lra_release\.gz, or a folder with pathfinder128/curv_baseline/metadata and"
    ):
        released.splits(tmp_path, 128, "curv_baseline", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match=r"^release must be lra_release\.gz, .*missing\.gz: No such file"):
        released.splits(tmp_path / "missing.gz", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match=r"lra_release\.gz must have pathfinder32/curv_baseline/metadata/0\.npy"):
        released.splits(packed(tmp_path, {}), 32, "curv_baseline", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match=r"^size must be 32, 64, 128, 256; got 31\.$"):
        released.splits(tmp_path, 31)
    with pytest.raises(ValueError, match=r"^difficulty must be one of"):
        released.splits(tmp_path, 32, "hard")
