"""Gets a published file once, and takes it for good only if its size and its SHA-256 are the published ones."""

import contextlib
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

_BLOCK = 2**20
_TIMEOUT = 60  # seconds without a byte


class DownloadError(ValueError):
    """A file that could not be had, or is not the published one; the text is a whole sentence for the user."""


@dataclass(frozen=True)
class Download:
    """A published file.

    Attributes:
      url: where its author serves it.
      size: in bytes.
      sha256: of its content, in hexadecimal digits.
      file: its name on disk; by default the last part of the url.
    """

    url: str
    size: int
    sha256: str
    file: str = ""

    @property
    def name(self) -> str:
        """Of the file on disk."""
        return self.file or self.url.rsplit("/", 1)[-1]


def obtain(download: Download, folder: Path, console: Console | None = None) -> Path:
    """The published file, from this folder if it is there, else from its author's server: its path, once it is checked.

    A copy of one's own is as good as a download: put it into the folder under the file's name. It is checked at each
    call. A download has another name until it is whole and checked, and is removed if it is not.

    Raises:
      DownloadError: if the server cannot be reached or breaks off, if the file is not the published one, or if the
        folder cannot be written to, for example because the disk is full. It names the file and the way out.
    """
    path = folder / download.name
    if path.exists():
        check(download, path)
        return path
    console = console or Console(quiet=True)
    by_hand = f"Or get it in another way and put it there as {path}."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f".{download.name}.", suffix=".incomplete", dir=folder)
    except OSError as error:
        raise DownloadError(
            f"{folder} must be a folder that can be made and written to, for {download.name}; got "
            f"{error.strerror or error}."
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            console.print(f"downloading {download.url} into {folder}", soft_wrap=True)
            _transfer(download, file.write, by_hand, console)
            file.flush()
            os.fsync(file.fileno())
        check(download, Path(partial), f"{path}, as downloaded from {download.url},")
        os.replace(partial, path)
    except OSError as error:
        raise DownloadError(
            f"{path} must be written whole; got {error.strerror or error}. Nothing was kept."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return path


def check(download: Download, path: Path, name: str = "") -> None:
    """Whether a file is the published one.

    Args:
      download: what it should be.
      path: of the file.
      name: to call it by; by default its path.

    Raises:
      DownloadError: if it is not: truncated, too long or another one.
    """
    name = name or f"{path}"
    again = f"Remove it to have it downloaded again, or put a whole copy of {download.url} there."
    try:
        size = path.stat().st_size
        if size != download.size:
            cut = "truncated" if size < download.size else "too long"
            raise DownloadError(f"{name} must have {download.size:,} bytes; got {size:,}: it is {cut}. {again}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DownloadError(f"{name} must be a readable file; got {error.strerror or error}.") from error
    if found != download.sha256:
        raise DownloadError(
            f"{name} must have the SHA-256 {download.sha256[:16]}...; got {found[:16]}...: it is damaged or another "
            f"file. {again}"
        )


def _transfer(download: Download, write: Callable[[bytes], object], by_hand: str, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    received = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(download.name, total=download.size)
        try:
            response = urllib.request.urlopen(download.url, timeout=_TIMEOUT)
        except (OSError, HTTPException) as error:  # urllib's errors are among them
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise DownloadError(
                f"{download.url} must be reachable to get {download.name}; got {_reason(error)}. {by_hand}"
            ) from error
        with response:
            # Not more than expected: a server that never ends must not fill the disk.
            while received <= download.size:
                try:
                    block = response.read(_BLOCK)
                except (OSError, HTTPException) as error:
                    raise DownloadError(
                        f"{download.url} broke off after {received:,} of {download.size:,} bytes ({_reason(error)}); "
                        f"nothing was kept. Run the same command again. {by_hand}"
                    ) from error
                if not block:
                    break
                write(block)
                received += len(block)
                progress.update(bar, completed=received)
    if received < download.size:
        raise DownloadError(
            f"{download.url} broke off after {received:,} of {download.size:,} bytes; nothing was kept. Run the same "
            f"command again. {by_hand}"
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    cause = getattr(error, "reason", error)  # urllib wraps the error of the socket
    reason = getattr(cause, "strerror", None) or cause
    return " ".join(str(reason).split()) or type(error).__name__
