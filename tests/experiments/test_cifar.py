"""CIFAR-10: read from archives in the published format, in three forms, and refused where something is wrong."""

import hashlib
import io
import re
import tarfile
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.common import splits
from experiments.common.downloads import Download
from experiments.images.cifar import dataset, published
from experiments.images.cifar.published import Images

ROWS = 6  # of each batch


def batch_of(images: Images) -> bytes:
    """In the published format: label, red, green, blue."""
    return b"".join(
        bytes([label]) + pixels.transpose(2, 0, 1).tobytes()
        for pixels, label in zip(images.pixels, images.labels, strict=True)
    )


@pytest.fixture
def batches(monkeypatch) -> dict[str, Images]:
    monkeypatch.setattr(published, "ROWS_OF_A_BATCH", ROWS)
    rng = np.random.default_rng(0)
    names = (*published.TRAIN_BATCHES, published.TEST_BATCH)
    return {
        name: Images(rng.integers(0, 256, (ROWS, 32, 32, 3), np.uint8), rng.integers(0, 10, ROWS, np.int32))
        for name in names
    }


def packed(folder: Path, contents: dict[str, bytes], monkeypatch) -> Path:
    """An archive that counts as the published one."""
    path = folder / published.ARCHIVE.name
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name if "/" in name else f"{published.FOLDER}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    content = path.read_bytes()
    same = Download(published.ARCHIVE.url, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(published, "ARCHIVE", same)
    return path


def written(batches: dict[str, Images]) -> dict[str, bytes]:
    return {name: batch_of(images) for name, images in batches.items()} | {"batches.meta.txt": b"airplane\n"}


def assert_read(data_dir: Path, batches: dict[str, Images]) -> None:
    train, test = published.read(data_dir)
    np.testing.assert_array_equal(train.pixels, np.concatenate([batches[name].pixels for name in batches][:5]))
    np.testing.assert_array_equal(train.labels, np.concatenate([batches[name].labels for name in batches][:5]))
    np.testing.assert_array_equal(test.pixels, batches[published.TEST_BATCH].pixels)
    np.testing.assert_array_equal(test.labels, batches[published.TEST_BATCH].labels)


def test_the_archive_is_read(tmp_path, batches, monkeypatch):
    packed(tmp_path, written(batches), monkeypatch)
    assert_read(tmp_path, batches)


def test_the_unpacked_archive_is_read(tmp_path, batches):
    (tmp_path / published.FOLDER).mkdir()
    for name, content in written(batches).items():
        (tmp_path / published.FOLDER / name).write_bytes(content)
    assert_read(tmp_path, batches)
    (tmp_path / published.FOLDER / "data_batch_3.bin").unlink()
    with pytest.raises(
        ValueError, match=r"cifar-10-batches-bin must hold data_batch_1\.bin.*it lacks data_batch_3\.bin"
    ):
        published.read(tmp_path)


def test_the_published_archive_is_the_one_of_toronto():
    assert published.ARCHIVE.name == "cifar-10-binary.tar.gz"
    assert len(published.ARCHIVE.sha256) == 64
    assert published.ROWS_OF_A_BATCH * 5 == dataset.TRAIN_ROWS + dataset.VALIDATION_ROWS


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / published.ARCHIVE.name
    path.write_bytes(b"truncated")
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))} must have 170,052,171 bytes; got 9: it is truncated"
    ):
        dataset.splits("gray", tmp_path)


def test_a_missing_batch_is_named(tmp_path, batches, monkeypatch):
    contents = written(batches)
    del contents["test_batch.bin"]
    path = packed(tmp_path, contents, monkeypatch)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must hold .* it lacks test_batch\.bin\.$"):
        published.read(tmp_path)


def test_a_hostile_path_is_refused(tmp_path, batches, monkeypatch):
    packed(tmp_path, written(batches) | {"../evil.bin": b"x"}, monkeypatch)
    with pytest.raises(ValueError, match=r"got '\.\./evil\.bin'"):
        published.read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda content: content[:-1], "must have 6 records of 3,073 bytes; got 18,437 bytes: it is truncated"),
        (lambda content: b"", "must have 6 records of 3,073 bytes; got 0 bytes: it is truncated"),
        (lambda content: content[: 2 * 3073] + b"\x0a" + content[2 * 3073 + 1 :], "record 3: the label must be from 0"),
        (lambda content: content[: 5 * 3073] + b"\xff" + content[5 * 3073 + 1 :], "record 6: .* to 9; got 255"),
    ],
)
def test_a_damaged_batch_is_named(tmp_path, batches, monkeypatch, changed, problem):
    contents = written(batches)
    contents["data_batch_2.bin"] = changed(contents["data_batch_2.bin"])
    packed(tmp_path, contents, monkeypatch)
    with pytest.raises(ValueError, match=rf"cifar-10-binary\.tar\.gz/data_batch_2\.bin.*{problem}"):
        published.read(tmp_path)


def test_a_batch_too_long_is_named(batches):
    content = batch_of(batches["test_batch.bin"])
    with pytest.raises(ValueError, match="it is too long"):
        published.parse(content + content, "test_batch.bin")


# forms and splits


def test_forms(tmp_path, batches):
    images = batches["data_batch_1.bin"]
    rgb, grid, gray = (dataset.formed(form, images) for form in ("rgb", "grid", "gray"))
    assert (gray.inputs.shape, rgb.inputs.shape, grid.inputs.shape) == ((6, 1024, 1), (6, 1024, 3), (6, 32, 32, 3))
    assert {split.inputs.dtype for split in (gray, rgb, grid)} == {np.dtype(np.uint8)}
    np.testing.assert_array_equal(rgb.inputs[2, 5 * 32 + 7], images.pixels[2, 5, 7])  # row by row
    for row in range(ROWS):
        luma = np.asarray(Image.fromarray(images.pixels[row]).convert("L"))
        np.testing.assert_array_equal(gray.inputs[row].reshape(32, 32), luma)


def test_every_colour_is_as_gray_as_in_pillow():
    colours = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    np.testing.assert_array_equal(dataset.gray(colours), np.asarray(Image.fromarray(colours).convert("L")))


def test_the_validation_images_are_those_of_the_s4_repository():
    train, validation = splits.random_split((45_000, 5_000))
    assert (len(train), len(validation)) == (45_000, 5_000)
    assert sorted([*train, *validation]) == list(range(50_000))
    # What torch.randperm(10, generator=torch.Generator().manual_seed(42)) gives.
    assert np.concatenate(splits.random_split((6, 4))).tolist() == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    assert not np.array_equal(splits.random_split((45_000, 5_000), seed=1)[1], validation)


def test_examples_keep_their_labels_through_the_split(batches):
    rows = 30
    pixels = np.arange(rows, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    train = Images(pixels, np.arange(rows, dtype=np.int32) % 10)
    divided = dataset.divided("grid", train, batches["test_batch.bin"], (20, 10))
    assert [len(split) for split in divided] == [20, 10, 6]
    for split in divided[:2]:
        example = grain.MapDataset.source(split)[3]
        assert example.keys() == {"inputs", "labels"}
        assert example["inputs"][0, 0, 0] % 10 == example["labels"]
    np.testing.assert_array_equal(divided.test.inputs, batches["test_batch.bin"].pixels)


@pytest.mark.parametrize(
    ("form", "mean", "std"), [("gray", [122.6], [61.0]), ("rgb", None, None), ("grid", None, None)]
)
def test_normalization_is_that_of_the_paper(form, mean, std):
    inputs = np.random.default_rng(0).integers(0, 256, (4, 7, 1 if form == "gray" else 3), np.uint8)
    mean = np.array(mean or [255 * 0.4914, 255 * 0.4822, 255 * 0.4465])
    std = np.array(std or [255 * 0.247, 255 * 0.243, 255 * 0.261])
    normalized = jax.jit(dataset.normalize, static_argnums=1)(inputs, form)
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, (inputs.astype(np.float64) - mean) / std, atol=2e-6)  # measured 4e-7


def test_made_up_images_need_no_archive():
    train, validation, test = dataset.splits("gray", None)
    assert (len(train), len(validation), len(test)) == (512, 128, 128)
    assert set(train.labels) == set(range(10))
    again = dataset.splits("gray", None)
    np.testing.assert_array_equal(again.test.inputs, test.inputs)
    assert not np.array_equal(validation.inputs, test.inputs)


def test_an_unknown_form_is_a_sentence():
    with pytest.raises(ValueError, match=r"^form must be gray, rgb or grid; got 'grey'\.$"):
        dataset.splits("grey", None)
