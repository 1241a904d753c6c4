"""A published file is taken for good when it is whole and the right one, and otherwise nothing is left behind."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from experiments.common import downloads
from experiments.common.downloads import Download, DownloadError, obtain

CONTENT = bytes(range(256)) * 100


class Server(BaseHTTPRequestHandler):
    """Answers with `CONTENT`, or with what the path asks for."""

    def do_GET(self) -> None:
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path.startswith("/cut"):  # promises more than it sends
            self.send_header("Content-Length", str(len(CONTENT)))
            body = CONTENT[:5000]
        elif self.path.startswith("/short"):
            body = CONTENT[:-1]
        elif self.path.startswith("/long"):
            body = CONTENT + b"more"
        elif self.path.startswith("/changed"):
            body = b"X" + CONTENT[1:]
        else:
            body = CONTENT
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None: ...


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    served = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()
    served.server_close()


def published(url: str) -> Download:
    return Download(url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def test_it_is_downloaded_once(server, tmp_path):
    path = obtain(published(f"{server}/whole.bin"), tmp_path / "data")
    assert path == tmp_path / "data/whole.bin"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert obtain(published("http://127.0.0.1:9/whole.bin"), tmp_path / "data") == path  # nobody was asked


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("missing", r"must be reachable to get missing\.bin; got HTTP status 404\. Or get it in another way"),
        ("cut", r"broke off after 5,000 of 25,600 bytes.*nothing was kept"),
        ("short", "broke off after 25,599 of 25,600 bytes; nothing was kept"),
        ("long", "must have 25,600 bytes; got 25,604: it is too long"),
        ("changed", r"must have the SHA-256 [0-9a-f]{16}\.\.\.; got [0-9a-f]{16}\.\.\.: it is damaged"),
    ],
)
def test_what_is_not_the_published_file_is_not_kept(server, tmp_path, kind, problem):
    with pytest.raises(DownloadError, match=problem) as caught:
        obtain(published(f"{server}/{kind}.bin"), tmp_path)
    assert f"{tmp_path / kind}.bin" in str(caught.value)  # where a copy of one's own would go
    assert list(tmp_path.iterdir()) == []


def test_nobody_there_is_a_sentence(tmp_path):
    with pytest.raises(DownloadError, match=r"must be reachable to get a\.bin; got Connection refused\. Or get it in"):
        obtain(published("http://127.0.0.1:9/a.bin"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_ones_own_is_checked(tmp_path):
    download = published("http://127.0.0.1:9/own.bin")
    own = tmp_path / "own.bin"
    own.write_bytes(CONTENT[:-3])
    with pytest.raises(DownloadError, match=rf"^{re.escape(str(own))} must have 25,600 bytes; got 25,597: it is trunc"):
        obtain(download, tmp_path)
    own.write_bytes(CONTENT[:-1] + b"X")
    with pytest.raises(DownloadError, match=rf"^{re.escape(str(own))} must have the SHA-256 .*Remove it to have it"):
        obtain(download, tmp_path)
    assert own.exists()  # it is not ours to remove
    own.write_bytes(CONTENT)
    assert obtain(download, tmp_path) == own


def test_a_full_disk_leaves_nothing(server, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.os, "fsync", full)
    with pytest.raises(DownloadError, match=r"full\.bin must be written whole; got No space left on device\. Nothing"):
        obtain(published(f"{server}/full.bin"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_valid(server, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        obtain(published(f"{server}/a.bin"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"file must be a folder that can be made and written to, for a\.bin; got"):
        obtain(published("http://127.0.0.1:9/a.bin"), tmp_path / "file")


def test_the_name_may_be_given():
    assert Download("http://host/path/a.tar.gz", 1, "").name == "a.tar.gz"
    assert Download("http://host/path?download=1", 1, "", "a.tar.gz").name == "a.tar.gz"


def test_a_path_is_a_path(server, tmp_path):
    assert isinstance(obtain(published(f"{server}/b.bin"), tmp_path), Path)
