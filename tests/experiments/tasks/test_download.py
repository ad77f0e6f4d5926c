"""Against real pip, with a small wheel and a local folder as the index."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.tasks import download
from experiments.tasks.download import DownloadError, PackagedFile, fetch

REPOSITORY = Path(download.__file__).parents[2]
REQUIREMENT = "tiny-data==1.0"
WHEEL = "tiny_data-1.0-py3-none-any.whl"
CONTENT = {"tiny_data/a.bin": os.urandom(3_000_000), "tiny_data/b.txt": b"b"}


def packaged(member: str, sha256: str | None = None) -> PackagedFile:
    return PackagedFile(REQUIREMENT, member, sha256 or hashlib.sha256(CONTENT[member]).hexdigest())


A, B = (packaged(member) for member in CONTENT)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with the wheel, the only place where pip looks; and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    metadata = {
        "METADATA": b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
        "WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": b"",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for member, content in CONTENT.items():
            wheel.writestr(member, content)
        for name, content in metadata.items():
            wheel.writestr(f"tiny_data-1.0.dist-info/{name}", content)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.fspath(folder))
    monkeypatch.setenv("DORA_JAX_CACHE", os.fspath(tmp_path / "cache"))
    return folder


def without_network(monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")


def cached_files() -> list[str]:
    cache = download.cache_folder()
    files = (path.relative_to(cache) for path in cache.rglob("*") if path.is_file())
    return sorted(os.fspath(path) for path in files if path.suffix != ".lock")


def test_files_are_those_of_the_wheel_and_nothing_else_stays(index):
    paths = fetch([A, B])
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert cached_files() == [f"tiny-data-1.0/{member}" for member in CONTENT]


def test_cached_files_need_no_pip(index, monkeypatch, capsys):
    fetch([A, B])
    capsys.readouterr()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert fetch([A, B])[1].read_bytes() == b"b"
    assert capsys.readouterr().err == ""


def test_wrong_sha256_is_refused_and_leaves_nothing(index):
    wrong = packaged("tiny_data/b.txt", sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"b\.txt of tiny_data-1\.0.*expected 0000"):
        fetch([wrong])
    assert cached_files() == []


def test_member_that_the_wheel_lacks_is_named(index):
    with pytest.raises(DownloadError, match=r"tiny_data/c\.txt"):
        fetch([packaged("tiny_data/c.txt", sha256="0" * 64)])
    assert cached_files() == []


def test_corrupt_cached_file_is_noticed_and_replaced(index, capsys):
    path = fetch([A])[0]
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert fetch([A])[0].read_bytes() == CONTENT[A.wheel_member]
    assert f"{path}: not the pinned file" in capsys.readouterr().err


def test_without_network_the_message_says_what_to_do(index, monkeypatch):
    without_network(monkeypatch)
    with pytest.raises(DownloadError) as raised:
        fetch([A, B])
    message = str(raised.value)
    for part in [str(A.path()), str(B.path()), "pip download --no-deps tiny-data==1.0"]:
        assert part in message
    assert "No matching distribution found for tiny-data==1.0" in message
    assert cached_files() == []


def test_wheel_unpacked_by_hand_as_the_message_says_is_found(index, monkeypatch):
    without_network(monkeypatch)
    with pytest.raises(DownloadError) as raised:
        fetch([A])
    (line,) = [line for line in str(raised.value).splitlines() if "-m zipfile" in line]
    folder = line.split('"')[1]
    command = [sys.executable, "-m", "zipfile", "-e", os.fspath(index / WHEEL), folder]
    subprocess.run(command, check=True)
    assert fetch([A])[0].read_bytes() == CONTENT[A.wheel_member]


def test_files_of_two_requirements_are_refused():
    with pytest.raises(ValueError, match=r"one requirement.*tiny-data==2\.0"):
        fetch([A, PackagedFile("tiny-data==2.0", "a", "0" * 64)])


# Each is run in the child before it fetches, so that it dies at that point.
KILL_POINTS = {
    "half a file extracted": """
def half(source, target, length):
    target.write(source.read(1000))
    target.flush()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.copyfileobj = half
""",
    "file complete, not moved": """
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
""",
    "one file moved, the other not": """
replace, calls = os.replace, []
def second(*paths):
    calls.append(paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = second
""",
}


def fetch_in_child(prelude: str = "") -> subprocess.Popen[bytes]:
    code = "import os, shutil, signal\nfrom experiments.tasks.download import *\n" + prelude
    code += f"fetch([{A!r}, {B!r}])"
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)


@pytest.mark.full
@pytest.mark.parametrize(
    "prelude",
    [
        pytest.param(prelude, id=point, marks=[] if "one file" in point else [pytest.mark.full])
        for point, prelude in KILL_POINTS.items()
    ],
)
def test_killed_while_extracting_leaves_no_partial_file_and_is_redone(index, prelude):
    child = fetch_in_child(prelude)
    assert child.wait(60) == -signal.SIGKILL
    assert any(".partial-" in path for path in cached_files())
    assert not B.path().exists()
    assert not A.path().exists() or A.path().read_bytes() == CONTENT[A.wheel_member]
    fetch([A, B])
    assert cached_files() == [f"tiny-data-1.0/{member}" for member in CONTENT]


def test_killed_while_pip_downloads_is_redone(index, monkeypatch):
    half_sent, go_on = threading.Event(), threading.Event()

    class StallingIndex(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wheel = (index / WHEEL).read_bytes()
            is_wheel = self.path.endswith(".whl")
            body = wheel if is_wheel else f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if is_wheel else body)
            if is_wheel:
                half_sent.set()
                go_on.wait(60)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StallingIndex) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with monkeypatch.context() as patch:
            patch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
            patch.setenv("PIP_RETRIES", "0")
            patch.setenv("NO_PROXY", "127.0.0.1")
            child = fetch_in_child()
        assert half_sent.wait(60)
        child.kill()
        child.wait()
        go_on.set()
        server.shutdown()
    assert any(".partial-" in path for path in cached_files())
    fetch([A, B])
    assert [path.read_bytes() for path in (A.path(), B.path())] == list(CONTENT.values())


@pytest.mark.full
def test_concurrent_runs_all_end_with_whole_files(index):
    children = [fetch_in_child() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda child: child.wait(60), children)) == [0, 0, 0]
    assert cached_files() == [f"tiny-data-1.0/{member}" for member in CONTENT]
    assert A.path().read_bytes() == CONTENT[A.wheel_member]


def test_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("DORA_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert download.cache_folder().is_relative_to(tmp_path)
