"""The loopback Hub with the real client, and what that client does when a download fails.

what is served       repo_info, list_repo_tree, paths-info, hf_hub_download, HfFileSystem, plain URLs
what the client does a cut and a reset connection, 429 and 503, an outage, a killed process
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, HfFileSystem, close_session, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.hub_server import HubServer

REPO = "someone/some-texts"
FILES = {
    "README.md": b"# Some texts\n",
    "data/en/000.jsonl.gz": b"\x1f\x8b\x08 not really gzip",
    "data/en/001.jsonl.gz": b"",
    "data/fr/number 0.jsonl": b'{"text": "salut"}\n',
    "data.txt": b"beside the folder of that name",
}
LARGE = np.random.default_rng(1).bytes(12 << 20)  # the client writes, and so resumes at, every 10 MiB


@pytest.fixture(autouse=True)
def _reachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client without proxies or connections from other tests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(page_size=2) as server:
        yield server


def fetch(hub: HubServer, folder: Path, name: str, revision: str = "main") -> bytes:
    path = hf_hub_download(
        REPO, name, repo_type="dataset", revision=revision, endpoint=hub.endpoint, local_dir=folder, token=False
    )
    return Path(path).read_bytes()


def test_repo_info_current_and_past_commits(hub: HubServer, tmp_path: Path) -> None:
    old, new = hub.add_dataset(REPO, FILES), hub.add_dataset(REPO, FILES | {"data.txt": b"changed"})
    assert old != new
    assert hub.add_dataset(REPO, FILES | {"data.txt": b"changed"}) == new
    api = HfApi(hub.endpoint, token=False)
    assert api.repo_info(REPO, repo_type="dataset").sha == new
    info = api.repo_info(REPO, repo_type="dataset", revision=old, files_metadata=True)
    assert info.sha == old
    assert {one.rfilename: one.size for one in info.siblings} == {name: len(data) for name, data in FILES.items()}
    assert fetch(hub, tmp_path / "old", "data.txt", old) == FILES["data.txt"]
    assert fetch(hub, tmp_path / "new", "data.txt") == b"changed"


def test_listing_pagination(hub: HubServer) -> None:
    sha = hub.add_dataset(REPO, FILES)
    api = HfApi(hub.endpoint, token=False)
    entries = {one.path: one for one in api.list_repo_tree(REPO, recursive=True, repo_type="dataset")}
    assert list(entries) == ["README.md", "data.txt", "data", "data/en", *list(FILES)[1:3], "data/fr", list(FILES)[3]]
    assert len(hub.seen("/tree/main")) == 4
    lfs = entries["data/en/000.jsonl.gz"].lfs
    content = FILES["data/en/000.jsonl.gz"]
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert entries["README.md"].lfs is None
    assert entries["README.md"].blob_id == hashlib.sha1(b"blob 13\0# Some texts\n").hexdigest()

    below = list(api.list_repo_tree(REPO, "data/en", expand=True, revision=sha, repo_type="dataset"))
    assert [one.path for one in below] == ["data/en/000.jsonl.gz", "data/en/001.jsonl.gz"]
    assert below[0].last_commit.oid == sha
    path_infos = api.get_paths_info(REPO, ["data", "data.txt", "nothing"], repo_type="dataset")
    assert [one.path for one in path_infos] == ["data", "data.txt"]


def test_download_to_folder(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, FILES)
    assert {name: fetch(hub, tmp_path, name) for name in FILES} == FILES
    assert [one.status for one in hub.seen("/resolve/.*000.jsonl.gz")] == [302]
    assert [one.status for one in hub.seen("/cdn/.*000.jsonl.gz")] == [200]
    assert [(one.method, one.status) for one in hub.seen("README")] == [("HEAD", 200), ("GET", 200)]


def test_parquet_row_group_read_by_ranges(hub: HubServer, tmp_path: Path) -> None:
    """HfFileSystem retries 429, 5xx and lost connections five times."""
    table = pa.table({"text": [np.random.default_rng(i).bytes(50).hex() for i in range(4_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1_000)
    content = (tmp_path / "a.parquet").read_bytes()
    hub.add_dataset(REPO, {"data/a.parquet": content})
    files = HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True)
    assert files.ls(f"datasets/{REPO}/data", detail=False) == [f"datasets/{REPO}/data/a.parquet"]
    hub.fail_next("/cdn/.*a.parquet")
    with files.open(f"datasets/{REPO}/data/a.parquet", block_size=8192) as file:
        rows = pq.ParquetFile(file).read_row_group(2)
    assert rows.equals(table.slice(2_000, 1_000))
    requests = hub.seen("/cdn/")
    assert [one.status for one in requests] == [503] + [206] * (len(requests) - 1)
    assert sum(one.sent_bytes for one in requests) < len(content) / 2


def test_client_resumes_cut_but_not_reset(hub: HubServer, tmp_path: Path) -> None:
    """The client resumes after an orderly close; a reset raises an httpx error, not an OSError.

    It resumes where it last wrote, at a multiple of 10 MiB: a smaller file starts again without a Range.
    """
    hub.add_dataset(REPO, {"large.bin": LARGE})
    hub.cut_next("large.bin", 11 << 20)
    assert fetch(hub, tmp_path / "cut", "large.bin") == LARGE
    requests = hub.seen("/cdn/")
    assert [one.range for one in requests] == [None, f"bytes={10 << 20}-"]
    assert [one.sent_bytes for one in requests] == [11 << 20, 2 << 20]

    hub.cut_next("large.bin", 11 << 20, reset=True)
    with pytest.raises(Exception, match="reset by peer") as caught:
        fetch(hub, tmp_path / "reset", "large.bin")
    assert not isinstance(caught.value, OSError)
    assert not list((tmp_path / "reset").rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("method", "status", "is_retried"),
    [("HEAD", 429, True), ("HEAD", 503, True), ("GET", 429, True), ("GET", 503, False)],
)
def test_download_retry_by_status(hub: HubServer, tmp_path: Path, method: str, status: int, is_retried: bool) -> None:
    """hf_hub_download retries 429 (and 408) on HEAD and on GET, but a 5xx on HEAD alone: on GET that is raised.

    Of HfApi, list_repo_tree retries both; repo_info and get_paths_info raise both. Each wait is Retry-After plus one
    second, or 1, 2, 4, 8, 8 seconds where there is none, and the sixth failure is raised.
    """
    hub.add_dataset(REPO, FILES)
    hub.fail_next("data.txt", status=status, method=method)
    if is_retried:
        assert fetch(hub, tmp_path, "data.txt") == FILES["data.txt"]
    else:
        with pytest.raises(HfHubHTTPError, match=str(status)):
            fetch(hub, tmp_path, "data.txt")
    assert [one.status for one in hub.seen("data.txt", method)] == [
        status,
        *([302 if method == "HEAD" else 200] * is_retried),
    ]


def test_listing_retry_by_request(hub: HubServer) -> None:
    hub.add_dataset(REPO, FILES)
    api = HfApi(hub.endpoint, token=False)
    hub.fail_next("cursor=", status=429)
    assert len(list(api.list_repo_tree(REPO, recursive=True, repo_type="dataset"))) == 8
    hub.fail_next(f"/api/datasets/{REPO}", status=429, method="*", times=2)
    with pytest.raises(HfHubHTTPError, match="429"):
        api.repo_info(REPO, repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="429"):
        api.get_paths_info(REPO, "data", repo_type="dataset")


def test_missing_repo_revision_or_file_raises(hub: HubServer, tmp_path: Path) -> None:
    """RemoteEntryNotFoundError, since its base class EntryNotFoundError is also raised for an unreachable Hub."""
    hub.add_dataset(REPO, FILES)
    api = HfApi(hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("someone/else", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, repo_type="dataset", revision="0" * 40)
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, tmp_path, "data.txt", "0" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        fetch(hub, tmp_path, "nothing")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing", repo_type="dataset"))


def test_outage_falls_back_to_local_file(hub: HubServer, tmp_path: Path) -> None:
    """During an outage the client silently uses a file that was downloaded before."""
    hub.add_dataset(REPO, FILES)
    assert fetch(hub, tmp_path, "data.txt") == FILES["data.txt"]
    api = HfApi(hub.endpoint, token=False)
    for status in (503, None):
        hub.down(status)
        with pytest.raises(Exception, match=r"503|disconnected"):
            api.repo_info(REPO, repo_type="dataset")
    hub.down()
    assert fetch(hub, tmp_path, "data.txt") == FILES["data.txt"]
    hub.up()
    assert api.repo_info(REPO, repo_type="dataset").id == REPO


def test_killed_download_restarts(hub: HubServer, tmp_path: Path) -> None:
    """Each attempt of the client has its own partial file, which a killed process leaves on disk unused."""
    hub.add_dataset(REPO, {"large.bin": LARGE})
    hub.hold("/cdn/", 11 << 20)
    words = f"{REPO!r}, 'large.bin', repo_type='dataset', local_dir={str(tmp_path)!r}, token=False"
    program = f"from huggingface_hub import hf_hub_download; hf_hub_download({words})"
    client = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"HF_ENDPOINT": hub.endpoint})
    deadline = time.monotonic() + 240
    partial = tmp_path / ".cache" / "huggingface" / "download"
    while not any(file.stat().st_size >= 10 << 20 for file in partial.glob("*.incomplete")):
        assert client.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.send_signal(signal.SIGKILL)
    client.wait(timeout=240)
    hub.release()
    assert fetch(hub, tmp_path, "large.bin") == LARGE
    assert [one.range for one in hub.seen("/cdn/")] == [None, None]
    assert len(list(partial.glob("*.incomplete"))) == 1


def test_plain_urls(hub: HubServer) -> None:
    url = hub.add_plain("v1/part 0.json.gz", b"\x1f\x8b0123456789")

    def ask(method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, method=method, headers=named)) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    status, body, headers = ask("HEAD")
    assert (status, body, headers["Content-Length"], headers["Accept-Ranges"]) == (200, b"", "12", "bytes")
    assert "Content-Encoding" not in headers
    assert ask()[1] == b"\x1f\x8b0123456789"
    assert ask(Range="bytes=2-4")[:2] == (206, b"012")
    assert ask(Range="bytes=10-99", If_Range=headers["ETag"])[:2] == (206, b"89")
    assert ask(Range="bytes=-3")[2]["Content-Range"] == "bytes 9-11/12"
    assert ask(Range="bytes=12-")[0] == 416
    hub.add_plain("v1/part 0.json.gz", b"changed")
    assert ask(Range="bytes=2-4", If_Range=headers["ETag"])[:2] == (200, b"changed")
    hub.fail_next("part 0", status=429, retry_after=7)
    assert (ask()[0], ask("HEAD")[0]) == (429, 200)
