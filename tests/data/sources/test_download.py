"""Downloads survive bad connections, are verified before they get their name, and fail with clear messages."""

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from support.hub_server import HubServer

from myllm.data.sources import download
from myllm.data.sources.download import download_file, download_head, local_path
from myllm.data.sources.hub_listing import UnreachableError
from myllm.data.sources.source import SourceFile
from myllm.errors import UserError, out_of_space

REPO = "someone/some-texts"
NAME = "data/train 0.parquet"
CONTENT = np.random.default_rng(1).bytes(4 << 20)
FETCH = """
import json, sys
from pathlib import Path
from myllm.data.sources.download import download_file
from myllm.data.sources.source import SourceFile
download_file(SourceFile(**json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what the client writes at a time
    with HubServer() as server, server.reached(monkeypatch, tmp_path / "home"):
        yield server


@pytest.fixture
def file(hub: HubServer) -> SourceFile:
    sha = hub.add_dataset(REPO, {NAME: CONTENT, "notes.md": b"small", "empty.jsonl": b""})
    where = f"hf://datasets/{REPO}@{sha}/{NAME}"
    return SourceFile(NAME, where, "parquet", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the seconds of each sleep, without sleeping."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def plain(hub: HubServer, content: bytes, size_bytes: int) -> SourceFile:
    url = hub.add_plain("v1/a.json.gz", content)
    return SourceFile("v1/a.json.gz", url, "jsonl", size_bytes, f'url:{url} {size_bytes} "{md5(content)}"')


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def sent(hub: HubServer) -> int:
    return sum(request.sent_bytes for request in hub.seen("/cdn/|/plain/"))


def test_download_reuses_local_file(hub: HubServer, file: SourceFile, tmp_path: Path) -> None:
    path = download_file(file, tmp_path / "d")
    assert path == local_path(file, tmp_path / "d")
    assert path.suffix == ".parquet"
    assert path.read_bytes() == CONTENT
    assert download_file(file, tmp_path / "d") == path
    assert download_file(file, tmp_path / "other", kept=tmp_path / "d") == path
    assert len(hub.seen("/cdn/")) == 1
    assert left(tmp_path / "d") == [path.name]


def test_small_files_verified_by_git_hash(hub: HubServer, file: SourceFile, tmp_path: Path) -> None:
    digest = "git:" + hashlib.sha1(b"blob 5\0small").hexdigest()
    notes = SourceFile("notes.md", file.location.replace(NAME, "notes.md"), "prose", 5, digest)
    assert download_file(notes, tmp_path).read_bytes() == b"small"
    with pytest.raises(UserError, match="not the listed file: git:"):
        download_file(replace(notes, name="other.md", digest="git:" + "0" * 40), tmp_path)
    nothing = SourceFile(
        "empty.jsonl", file.location.replace(NAME, "empty.jsonl"), "jsonl", 0, hashlib.sha256().hexdigest()
    )
    assert download_file(nothing, tmp_path).read_bytes() == b""


def test_dropped_connection_resumes(hub: HubServer, file: SourceFile, tmp_path: Path, waited: list[float]) -> None:
    hub.cut_next("/cdn/", 1 << 20, times=3)
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    requests = hub.seen("/cdn/")
    assert len(requests) == 4
    assert all(request.range for request in requests[1:])
    assert sent(hub) < 2 * len(CONTENT)


def test_connection_reset_retries(hub: HubServer, file: SourceFile, tmp_path: Path, waited: list[float]) -> None:
    hub.cut_next("/cdn/", 1 << 20, times=3, reset=True)
    assert download_file(file, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 503, 500, 408])
def test_honors_retry_after_header(
    hub: HubServer, file: SourceFile, tmp_path: Path, waited: list[float], status: int
) -> None:
    hub.cut_next("/cdn/", 1 << 20)
    hub.fail_next("/cdn/", status=status, retry_after=17)
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    assert 17 in waited or 18 in waited  # the client adds a second
    assert sum(waited) < 30


def test_honors_hub_rate_limit_headers() -> None:
    request = httpx2.Request("GET", "http://127.0.0.1/")

    def delay_s(headers: dict[str, str]) -> int:
        return download.retry_after(
            HfHubHTTPError("busy", response=httpx2.Response(429, headers=headers, request=request))
        )

    window = {"RateLimit": '"resolvers";r=0;t=55', "RateLimit-Policy": '"fixed window";"resolvers";q=500;w=300'}
    assert delay_s(window) == 56
    assert delay_s(window | {"RateLimit": '"resolvers";r=12;t=55'}) == 0
    assert delay_s(window | {"Retry-After": "7"}) == 7
    assert delay_s({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 0
    assert download.retry_after(OSError("no answer at all")) == 0


def test_rejects_changed_url_content(hub: HubServer, tmp_path: Path) -> None:
    listed = plain(hub, CONTENT, len(CONTENT))
    hub.add_plain("v1/a.json.gz", CONTENT[::-1])  # of the same size
    with pytest.raises(UserError, match=f"not the listed file: .*expected .*{md5(CONTENT)}.*Delete the listing"):
        download_file(listed, tmp_path)
    assert left(tmp_path) == []
    hub.add_plain("v1/a.json.gz", CONTENT)
    assert download_file(listed, tmp_path).read_bytes() == CONTENT


def test_restarts_without_range_support(hub: HubServer, file: SourceFile, tmp_path: Path, waited: list[float]) -> None:
    hub.ignore_ranges("/cdn/")
    hub.cut_next("/cdn/", 3 << 20)
    hub.cut_next("/cdn/", 1 << 20)
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    assert [request.status for request in hub.seen("/cdn/")] == [200] * 3


def test_killed_download_restarts(hub: HubServer, file: SourceFile, tmp_path: Path) -> None:
    hub.hold("/cdn/", 1 << 20)
    words = [sys.executable, "-c", FETCH, json.dumps(asdict(file)), str(tmp_path / "d")]
    client = subprocess.Popen(words, env=os.environ | hub.environment(tmp_path / "home"))
    deadline = time.monotonic() + 240
    while not hub.seen("/cdn/"):
        assert client.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    client.wait(timeout=240)
    hub.release()
    path = download_file(file, tmp_path / "d")
    assert path.read_bytes() == CONTENT
    assert left(tmp_path / "d") == [path.name]


def test_stalled_connection_resumes(
    hub: HubServer, file: SourceFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.hold("/cdn/", 1 << 20)

    def continue_after_second_request() -> None:
        while len(hub.seen("/cdn/")) < 2:
            time.sleep(0.01)
        hub.release()

    watching = threading.Thread(target=continue_after_second_request, daemon=True)
    watching.start()
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    watching.join()


def test_checksum_mismatch_retries_then_raises(hub: HubServer, file: SourceFile, tmp_path: Path) -> None:
    """Damage that keeps the size."""
    with pytest.raises(UserError, match=r"is not the listed file: sha256 .*expected 000.*Delete the listing") as caught:
        download_file(replace(file, digest="0" * 64), tmp_path)
    assert not isinstance(caught.value, UnreachableError)
    assert len(hub.seen("/cdn/")) == 2
    assert left(tmp_path) == []


@pytest.mark.parametrize("size", [10, 15, 25])
def test_rejects_size_mismatch(hub: HubServer, tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"not the listed file: 20 bytes, expected {size}"):
        download_file(plain(hub, b"0123456789" * 2, size), tmp_path)
    assert left(tmp_path) == []


def test_accepts_unknown_size(hub: HubServer, tmp_path: Path) -> None:
    file = replace(plain(hub, b"0123456789", 0), digest="")
    assert download_file(file, tmp_path).read_bytes() == b"0123456789"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_missing_or_private_file_raises_without_retry(
    hub: HubServer, file: SourceFile, tmp_path: Path, status: int
) -> None:
    hub.fail_next("/resolve/", status=status, method="HEAD", times=2)
    with pytest.raises(UnreachableError, match=rf"cannot download hf://.*{status}.*delete the listing.*hf auth login"):
        download_file(file, tmp_path)
    assert len(hub.requests) <= 2, "no retries"
    with pytest.raises(UnreachableError, match=r"cannot download http.*404"):
        download_file(replace(file, location=f"{hub.endpoint}/plain/nothing"), tmp_path)


def test_outage_raises_after_retries(hub: HubServer, file: SourceFile, tmp_path: Path, waited: list[float]) -> None:
    hub.down(503, retry_after=None)
    with pytest.raises(UnreachableError, match=r"cannot download .*503.*HF_ENDPOINT. Rerun the same command"):
        download_file(file, tmp_path)
    assert sum(waited) > 20, "long enough for a short outage"
    with socket.socket() as unused:  # nobody listens, and no other program gets the port meanwhile
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
        with pytest.raises(UnreachableError, match="Connection refused"):
            download_file(replace(file, location=nobody), tmp_path)


@pytest.fixture
def small_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_raises_without_retry(hub: HubServer, file: SourceFile, tmp_path: Path, small_disk: None) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        download_file(file, tmp_path)
    assert out_of_space(caught.value)
    assert len(hub.seen("/cdn/")) == 1


def test_token_sent_only_to_hub(
    hub: HubServer, file: SourceFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download_file(file, tmp_path)
    download_file(plain(hub, b"x", 1), tmp_path)
    download_head(plain(hub, b"x", 1), tmp_path, 1)
    seen = {(request.path.split("/")[1], request.authorization) for request in hub.requests}
    assert seen == {("datasets", "Bearer hf_secret"), ("cdn", None), ("plain", None)}


def test_ignores_kept_file_of_other_revision(hub: HubServer, file: SourceFile, tmp_path: Path) -> None:
    download_file(file, tmp_path / "kept")
    changed = CONTENT[::-1]
    sha = hub.add_dataset(REPO, {NAME: changed})
    where = f"hf://datasets/{REPO}@{sha}/{NAME}"
    other = replace(file, location=where, digest=hashlib.sha256(changed).hexdigest())
    assert download_file(other, tmp_path / "own", kept=tmp_path / "kept").read_bytes() == changed
    assert local_path(file, tmp_path / "kept").read_bytes() == CONTENT
    assert download_file(other, tmp_path / "kept", kept=tmp_path / "kept").read_bytes() == changed


def test_concurrent_calls_download_once(hub: HubServer, file: SourceFile, tmp_path: Path) -> None:
    hub.slow("/cdn/", 8 << 20)
    threads = [threading.Thread(target=download_file, args=(file, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert local_path(file, tmp_path).read_bytes() == CONTENT
    assert len(hub.seen("/cdn/")) == 1


@pytest.mark.parametrize("name", ["../../up.jsonl", "a/../../up.jsonl", "日" * 100 + ".jsonl", "d/" * 600 + "x.jsonl"])
def test_local_paths_distinct_and_contained(name: str, tmp_path: Path) -> None:
    def place(name: str) -> Path:
        return local_path(SourceFile(name, "https://x/y", "jsonl", 0, ""), tmp_path)

    found = place(name)
    assert found.resolve().is_relative_to(tmp_path)
    assert found.suffix == ".jsonl"
    assert found != place("x" + name)
    found.parent.mkdir(parents=True, exist_ok=True)
    found.with_name(found.name + ".part").touch()
