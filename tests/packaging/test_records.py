"""That records of measurements are replaced whole, or not at all."""

from pathlib import Path
from unittest import mock

import pytest

from pallas_kernels.records import write_atomically


def test_a_record_is_replaced(tmp_path):
    path = tmp_path / "record.json"
    for text in ("first\n", "second\n"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert [*tmp_path.iterdir()] == [path]


def test_a_full_disk_leaves_the_last_record_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, "first\n")
    full = OSError(28, "No space left on device")
    with mock.patch.object(Path, "replace", side_effect=full), pytest.raises(OSError, match="No space left"):
        write_atomically(path, "second\n")
    with pytest.raises(UnicodeEncodeError):  # while it is being written
        write_atomically(path, "\ud800")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "first\n"
