"""Tests of downloads into the cache, against a server on loopback."""

import multiprocessing
import signal
import time
from pathlib import Path

import pytest
from file_server import running_files
from huggingface_hub import constants

from ieft.data import downloads
from ieft.data.downloads import cached_file
from ieft.search.command import main as search

CONTENT = bytes(range(256)) * 4096  # 1 MiB
HALF = len(CONTENT) // 2


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    with running_files({"/weights.ckpt": CONTENT}) as server:
        server.url = f"{server.address}/weights.ckpt"
        yield server


def test_a_file_is_downloaded_once(server, tmp_path, capsys, monkeypatch):
    path = cached_file(server.url)
    assert path.read_bytes() == CONTENT and path.name == "weights.ckpt" and path.is_relative_to(tmp_path / "assets")
    assert "weights.ckpt" in capsys.readouterr().err  # the progress bar
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cached_file(server.url) == path and len(server.requests) == 1
    assert sorted(each.name for each in path.parent.iterdir()) == ["weights.ckpt", "weights.ckpt.lock"]


def test_searching_in_the_same_process_hides_no_progress_of_downloads(server, tmp_path, capsys):
    with pytest.raises(SystemExit):
        search(["info", "--model", str(tmp_path), "--index", str(tmp_path / "missing.lance")])
    capsys.readouterr()
    cached_file(server.url)
    assert "weights.ckpt" in capsys.readouterr().err


def test_a_download_that_breaks_off_is_resumed_in_the_same_call(server):
    server.cuts = [HALF, 1000]
    assert cached_file(server.url).read_bytes() == CONTENT
    assert [wish for _, wish in server.requests] == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]


def test_processes_at_once_download_once(server):
    server.delay = 0.3
    processes = [multiprocessing.get_context("fork").Process(target=cached_file, args=(server.url,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and len(server.requests) == 1
    assert cached_file(server.url).read_bytes() == CONTENT


def test_a_file_that_has_moved_is_followed_and_resumed(server):
    """As the release files of GitHub, which another server holds."""
    server.files["/moved.ckpt"] = f"{server.address}/weights.ckpt"
    server.cuts = [HALF]
    assert cached_file(f"{server.address}/moved.ckpt").read_bytes() == CONTENT
    assert server.requests[-1] == ("/weights.ckpt", f"bytes={HALF}-")
    server.files["/other.ckpt"] = "ftp://127.0.0.1/weights.ckpt"
    with pytest.raises(OSError, match="is not allowed|unknown url type"):
        cached_file(f"{server.address}/other.ckpt")


def test_a_process_that_is_killed_leaves_what_it_received_to_the_next(server, tmp_path, monkeypatch):
    server.cuts = [HALF]
    monkeypatch.setattr(downloads, "PAUSE", 60)
    process = multiprocessing.get_context("fork").Process(target=cached_file, args=(server.url,))
    process.start()
    while not [each for each in (tmp_path / "assets").rglob("*.incomplete") if each.stat().st_size == HALF]:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert cached_file(server.url).read_bytes() == CONTENT
    assert server.requests[-1][1] == f"bytes={HALF}-"


@pytest.mark.parametrize("what", ["without ranges", "without tags", "another file", "longer than the file"])
def test_parts_that_may_not_belong_together_are_not_joined(server, what):
    server.status, server.cuts = None, [HALF, 0, 0]
    with pytest.raises(OSError, match=f"{HALF:,} bytes were received, from which the same command resumes"):
        cached_file(server.url)
    server.cuts, content = [], CONTENT
    if what == "without ranges":
        server.ranges = False
    elif what == "without tags":
        server.tagged = False
    elif what == "another file":
        content = server.files["/weights.ckpt"] = bytes(reversed(CONTENT))
    else:
        partial = next(Path(constants.HF_ASSETS_CACHE).rglob("*.incomplete"))
        partial.write_bytes(CONTENT + b"more")
    assert cached_file(server.url).read_bytes() == content


def test_a_length_that_is_never_reached_is_an_error(server):
    server.length = len(CONTENT) + 1
    with pytest.raises(OSError, match=r"the connection ended after|HTTP Error 416"):
        cached_file(server.url)
    assert not list(Path(constants.HF_ASSETS_CACHE).rglob("weights.ckpt"))


@pytest.mark.parametrize(
    "change, message, requests",
    [
        ({"kind": "text/html; charset=utf-8"}, "is a web page, not a file", 1),
        ({"status": 404}, "HTTP Error 404.*Check the address", 1),
        ({"status": 503}, "HTTP Error 503.*Is there a network", 3),
    ],
)
def test_an_answer_that_is_not_the_file_is_an_error_and_not_kept(server, change, message, requests):
    vars(server).update(change)
    with pytest.raises(OSError, match=message):
        cached_file(server.url)
    assert len(server.requests) == requests
    vars(server).update(kind="application/octet-stream", status=None)
    assert cached_file(server.url).read_bytes() == CONTENT


def test_offline_and_not_cached_is_an_error_that_says_where_the_file_belongs(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set.*save the file as (.+weights.ckpt)") as raised:
        cached_file(server.url)
    assert server.requests == []
    place = Path(str(raised.value).rpartition(" as ")[2].rstrip("."))
    place.write_bytes(b"by hand")
    assert cached_file(server.url).read_bytes() == b"by hand"


def test_a_full_disk_is_named(server):
    place = cached_file(server.url)
    place.unlink()
    partial = place.with_name("weights.ckpt.incomplete")
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be saved as .*incomplete: No space left"):
        cached_file(server.url)


def test_a_mirror_of_github_serves_under_the_address_of_github(server, monkeypatch):
    server.files["/user/name/releases/download/1/weights.ckpt"] = CONTENT
    monkeypatch.setenv("IEFT_GITHUB_ENDPOINT", f"{server.address}/")
    path = cached_file("https://github.com/user/name/releases/download/1/weights.ckpt")
    assert path.read_bytes() == CONTENT
    monkeypatch.delenv("IEFT_GITHUB_ENDPOINT")
    assert cached_file("https://github.com/user/name/releases/download/1/weights.ckpt") == path
