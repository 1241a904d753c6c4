"""Reads tar archives that others made: member by member, in one pass, and nothing is ever unpacked to disk.

A download may be cut, damaged or hostile. What is not as it should be is refused in a sentence that names the archive,
and the member where there is one.
"""

import contextlib
import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

LARGEST_MEMBER = 2**30  # bytes: what is read is held in memory
_AGAIN = "Remove it and get it again."


class ArchiveError(ValueError):
    """An archive that cannot be read or must not be; the text is a whole sentence for the user."""


class Member(NamedTuple):
    """A regular file of an archive."""

    name: str
    """Relative and normal, for example `cifar-10-batches-bin/test_batch.bin`."""

    content: bytes
    """All of it."""


def members(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, *, largest: int = LARGEST_MEMBER
) -> Iterator[Member]:
    """The regular files of a tar archive, plain or compressed by gzip, in their order.

    The whole archive is read and checked, to its last byte, also behind the last wanted member. So take nothing for
    good before the iterator has ended: what is wrong may come late.

    Args:
      path: of the archive. Whether it is compressed is told by its first bytes, not by its name.
      wanted: of a member's name, whether to read it. Others are checked alike, but not held.
      largest: bytes of a wanted member; a larger one is refused instead of filling the memory.

    Raises:
      ArchiveError: if the archive is missing, truncated or damaged; or if a member, wanted or not, is a link or a
        device, has an absolute path or one that climbs, or is too large.

    >>> import io, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "letters.tar.gz"
    ...     with tarfile.open(path, "w:gz") as archive:
    ...         header = tarfile.TarInfo("letters/a.txt")
    ...         header.size = 5
    ...         archive.addfile(header, io.BytesIO(b"alpha"))
    ...     list(members(path))
    [Member(name='letters/a.txt', content=b'alpha')]
    """
    with _reading(path) as file:
        watched = _Watched(file)
        with tarfile.open(
            fileobj=cast(IO[bytes], watched), mode="r|"
        ) as archive:  # a stream: no member is visited twice
            for header in archive:
                name = _safe_name(header, path)
                if header.isdir() or not wanted(name):
                    continue
                if header.size > largest:
                    raise ArchiveError(
                        f"{path} must have members of at most {largest:,} bytes; got {name!r} of {header.size:,}."
                    )
                content = archive.extractfile(header)
                assert content is not None, "regular files have contents"
                yield Member(name, content.read())
        while watched.read(2**20):  # up to the checksum of gzip, which comes last
            pass
        # Python takes a damaged header, and a cut between members, for the end. The true one is zeros alone.
        if watched.last_content > archive.offset or watched.position < archive.offset + tarfile.BLOCKSIZE:
            raise ArchiveError(
                f"{path} must be a whole tar archive; behind {archive.offset:,} bytes there is neither a member nor an "
                f"end, so it is truncated or damaged. {_AGAIN}"
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The archive's bytes, decompressed, and one kind of error for all that may be wrong with them."""
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not compressed:
                yield file
                return
            with gzip.GzipFile(fileobj=file) as decompressed:
                yield decompressed
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error) or type(error).__name__
        raise ArchiveError(
            f"{path} must be a whole tar archive; it is truncated or damaged ({reason}). {_AGAIN}"
        ) from error
    except OSError as error:
        raise ArchiveError(f"{path} must be a readable file; got {error.strerror or error}.") from error


def _safe_name(header: tarfile.TarInfo, archive: Path) -> str:
    """The normal name of a member that is a file or a folder below the archive's own."""
    name = PurePosixPath(header.name)
    if not (header.isreg() or header.isdir()):
        raise ArchiveError(
            f"{archive} must hold files and folders alone; got {header.name!r}, which is a link or a device. "
            "Nothing of it was used."
        )
    if name.is_absolute() or ".." in name.parts or "\\" in header.name or "\0" in header.name:
        raise ArchiveError(
            f"{archive} must hold paths below its own folder alone; got {header.name!r}. Nothing of it was used."
        )
    return str(name)


class _Watched:
    """A file that knows how far it was read."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self.position = 0
        self.last_content = 0
        """Behind the last byte that is not zero."""

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        if content := block.rstrip(b"\0"):
            self.last_content = self.position + len(content)
        self.position += len(block)
        return block


class Place(NamedTuple):
    """Where a regular file of a plain archive lies."""

    archive: Path
    name: str
    """Relative and normal."""

    offset: int
    """Of the content, in bytes."""

    size: int
    """Likewise."""

    def read(self) -> bytes:
        """The content.

        Raises:
          ArchiveError: if it cannot be read any more.
        """
        with _reading(self.archive) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise ArchiveError(f"{self.archive} must be a whole tar archive; it was cut since it was opened. {_AGAIN}")
        return content


def places(path: Path) -> list[Place]:
    """Where the regular files of a plain tar archive lie, to read them by themselves, in any order and number.

    Reads the headers alone, so it is fast where there are many archives; damage within a content is not seen.

    Raises:
      ArchiveError: if the archive is compressed, and otherwise as `members`.
    """
    found = []
    with _reading(path) as file:
        if isinstance(file, gzip.GzipFile):
            raise ArchiveError(f"{path} must be a plain tar archive; it is compressed. Decompress it by gzip -d.")
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for header in archive:
                name = _safe_name(header, path)
                if header.isreg():
                    found.append(Place(path, name, header.offset_data, header.size))
            file.seek(archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
        if end != bytes(tarfile.BLOCKSIZE):  # Python takes a damaged header, and a cut between members, for the end
            raise ArchiveError(
                f"{path} must be a whole tar archive; behind {archive.offset:,} bytes there is neither a member nor an "
                f"end, so it is truncated or damaged. {_AGAIN}"
            )
    return found
