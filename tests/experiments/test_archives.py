"""Tar archives of others: whole ones are read, all others are refused in a sentence that names them."""

import gzip
import io
import re
import tarfile
from pathlib import Path

import pytest

from experiments.common.archives import ArchiveError, members, places

RANDOM = bytes(range(256)) * 40  # does not compress to nothing, so that a cut may fall into it


def header(name: str, size: int = 0, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def archive(path: Path, *files: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as written:
        for info, content in files:
            written.addfile(info, io.BytesIO(content))
    return path


def file(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return header(name, len(content)), content


@pytest.fixture(params=["w", "w:gz"])
def letters(tmp_path, request) -> Path:
    return archive(
        tmp_path / "letters.tar",
        (header("letters", type=tarfile.DIRTYPE), b""),
        file("./letters/a.txt", b"alpha"),
        file("letters/b.txt", RANDOM),
        file("letters/empty.txt", b""),
        mode=request.param,
    )


def test_files_come_in_their_order(letters):
    found = list(members(letters))
    assert [(member.name, member.content) for member in found] == [
        ("letters/a.txt", b"alpha"),
        ("letters/b.txt", RANDOM),
        ("letters/empty.txt", b""),
    ]


def test_only_what_is_wanted_is_held(letters):
    assert [member.name for member in members(letters, lambda name: name.endswith("b.txt"))] == ["letters/b.txt"]


@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.1, 0.0])
def test_a_truncated_archive_is_named(letters, kept):
    content = letters.read_bytes()
    whole = len(content) if content[:2] == b"\x1f\x8b" else 512 * (1 + 1 + 1 + 1 + 20 + 1)  # without the padding
    letters.write_bytes(content[: int(kept * whole)])
    with pytest.raises(ArchiveError, match=rf"^{re.escape(str(letters))} must be a whole tar archive; .*Remove it and"):
        list(members(letters))


def test_a_cut_between_members_is_seen(tmp_path):
    path = archive(tmp_path / "a.tar", file("a", b"1" * 512), file("b", b"2" * 512), mode="w")
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(ArchiveError, match="behind 1,024 bytes there is neither a member nor an end"):
        list(members(path))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = archive(tmp_path / "a.tar", file("a", b"1" * 512), file("b", b"2" * 512), mode="w")
    content = bytearray(path.read_bytes())
    content[1024 + 150] ^= 0xFF  # within the checksum of the second header
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="behind 1,024 bytes there is neither"):
        list(members(path))


def test_a_changed_byte_is_seen(tmp_path):
    path = archive(tmp_path / "a.tar.gz", file("a", RANDOM))
    plain = bytearray(gzip.decompress(path.read_bytes()))
    trailer = path.read_bytes()[-8:]
    plain[700] ^= 1
    path.write_bytes(gzip.compress(bytes(plain))[:-8] + trailer)  # only the checksum tells
    with pytest.raises(ArchiveError, match=r"truncated or damaged \(CRC check failed"):
        list(members(path))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100, b"\x1f\x8b" + b"\0" * 2000])
def test_what_is_no_archive_is_named(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match=rf"^{re.escape(str(path))} must be a whole tar archive"):
        list(members(path))


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(ArchiveError, match=r"missing\.tar must be a readable file; got No such file"):
        list(members(tmp_path / "missing.tar"))


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        (header("/etc/passwd"), "below its own folder alone; got '/etc/passwd'"),
        (header("../../outside"), r"below its own folder alone; got '\.\./\.\./outside'"),
        (header("letters/../../outside"), "below its own folder alone"),
        (header("letters\\..\\outside"), "below its own folder alone"),
        (header("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "files and folders alone; got 'link'"),
        (header("hard", type=tarfile.LNKTYPE, linkname="letters/a.txt"), "files and folders alone; got 'hard'"),
        (header("device", type=tarfile.CHRTYPE), "files and folders alone; got 'device'"),
        (header("pipe", type=tarfile.FIFOTYPE), "files and folders alone; got 'pipe'"),
    ],
)
def test_a_hostile_member_is_refused_even_if_it_is_not_wanted(tmp_path, info, problem):
    path = archive(tmp_path / "a.tar.gz", file("letters/a.txt", b"alpha"), (info, b""))
    with pytest.raises(ArchiveError, match=rf"^{re.escape(str(path))} must hold .*{problem}.*Nothing of it was used"):
        list(members(path, lambda name: name == "letters/a.txt"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_member_that_would_fill_the_memory_is_refused(tmp_path):
    path = archive(tmp_path / "bomb.tar.gz", file("zeros", bytes(10_000_000)))
    assert path.stat().st_size < 20_000
    with pytest.raises(ArchiveError, match=r"bomb\.tar\.gz must have members of at most 1,000,000 bytes; got 'zeros'"):
        list(members(path, largest=1_000_000))


def test_files_of_a_plain_archive_are_read_where_they_lie(tmp_path):
    path = archive(tmp_path / "letters.tar", file("./letters/a.txt", b"alpha"), file("b", RANDOM), mode="w")
    assert [(place.name, place.read()) for place in reversed(places(path))] == [
        ("b", RANDOM),
        ("letters/a.txt", b"alpha"),
    ]


@pytest.mark.parametrize("kept", [0.69, 0.5, 0.1, 0.0])
def test_a_cut_archive_has_no_places(tmp_path, kept):
    path = archive(tmp_path / "letters.tar", file("a", RANDOM), file("b", RANDOM), mode="w")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ArchiveError, match=rf"^{re.escape(str(path))} must be a whole tar archive; .*truncated"):
        places(path)


def test_places_of_what_is_not_plain_or_not_safe_are_refused(tmp_path):
    with pytest.raises(ArchiveError, match="must be a plain tar archive; it is compressed"):
        places(archive(tmp_path / "a", file("a", b"alpha")))
    with pytest.raises(ArchiveError, match=r"must hold paths below its own folder alone; got '\.\./a'"):
        places(archive(tmp_path / "b", file("../a", b"alpha"), mode="w"))
    with pytest.raises(ArchiveError, match="must hold files and folders alone; got 'a', which is a link"):
        places(archive(tmp_path / "c", (header("a", type=tarfile.SYMTYPE, linkname="/etc"), b""), mode="w"))
    with pytest.raises(ArchiveError, match="must be a readable file"):
        places(tmp_path / "nowhere")


def test_an_archive_that_is_cut_after_it_was_opened_is_a_sentence(tmp_path):
    path = archive(tmp_path / "letters.tar", file("a", RANDOM), mode="w")
    [place] = places(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ArchiveError, match="it was cut since it was opened"):
        place.read()
