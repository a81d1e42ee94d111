"""Listings of remote sources: one request, then the cache; clear messages for what is missing."""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub_server import HubServer

from myllm.config import DataConfig
from myllm.data.prepare.prepare import resolve
from myllm.data.prepare.spec import make_spec
from myllm.data.sources import hub_listing
from myllm.data.sources.hub_listing import UnreachableError, list_hub, list_urls
from myllm.data.sources.source import find_source
from myllm.errors import UserError
from myllm.evals.examples import load_questions
from myllm.hub import import_model
from myllm.hub.client import check_token

REPO = "someone/some-texts"
FILES = {
    "README.md": b"# Some texts\n",
    "en/000.jsonl.gz": b"one",
    "en/001.jsonl.gz": b"",
    "en/deep/002.jsonl": b"two",
    "en.noclean/000.jsonl.gz": b"not asked for",
    "pictures/a.png": b"png",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temp_data: Path) -> Iterator[HubServer]:
    with HubServer(page_size=2) as server, server.reached(monkeypatch, tmp_path / "home"):
        yield server


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


def names(spec: str) -> list[str]:
    return [file.name for file in find_source(spec).files]


def test_globs_and_folders_select_files(hub: HubServer) -> None:
    hub.add_dataset(REPO, FILES)
    english = ["en/000.jsonl.gz", "en/001.jsonl.gz", "en/deep/002.jsonl"]
    # Whole folders are whole folders: "en" is not the beginning of "en.noclean".
    for glob in ("en", "en/", "en/*", "/en/*", "en/*.json*"):
        assert names(f"hub:{REPO}:{glob}") == english, glob
    assert names(f"hub:{REPO}:en/000.jsonl.gz") == english[:1]
    assert names(f"hub:{REPO}:en/deep/*") == english[2:]
    assert names(f"hub:{REPO}:*/000.jsonl.gz") == ["en.noclean/000.jsonl.gz", "en/000.jsonl.gz"]
    # Its card is no text; a glob may still name it.
    assert names(f"hub:{REPO}") == ["en.noclean/000.jsonl.gz", *english]
    assert names(f"hub:{REPO}:README.md") == ["README.md"]


def test_listing_reads_all_pages_of_folder(hub: HubServer) -> None:
    hub.add_dataset(REPO, {f"{folder}/{i}.jsonl": b"x%d" % i for folder in ("data", "other") for i in range(7)})
    assert len(names(f"hub:{REPO}:data/*.jsonl")) == 7
    assert len(hub.seen("/tree/")) == 4
    assert all("/data?" in one.path for one in hub.seen("/tree/"))


def test_files_pinned_by_commit_and_digest(hub: HubServer) -> None:
    sha = hub.add_dataset(REPO, FILES)
    lfs, git = (list_hub(REPO, None, path)[0] for path in ("en/000.jsonl.gz", "README.md"))
    assert lfs.url == f"hf://datasets/{REPO}@{sha}/en/000.jsonl.gz"
    assert (lfs.size_bytes, lfs.digest) == (3, hashlib.sha256(b"one").hexdigest())
    assert git.digest == "git:" + hashlib.sha1(b"blob 13\0# Some texts\n").hexdigest()


def test_explicit_revision(hub: HubServer) -> None:
    old = hub.add_dataset(REPO, FILES)
    hub.add_dataset(REPO, {"en/new.jsonl": b"new"})
    assert names(f"hub:{REPO}:en") == ["en/new.jsonl"]
    assert len(names(f"hub:{REPO}@{old}:en")) == 3
    assert names(f"hub:{REPO}@main:en") == ["en/new.jsonl"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:someone/else", r"no dataset 'someone/else' .*accept the dataset's terms at .*hf auth login"),
        (f"hub:{REPO}@v9", r"no revision 'v9'; omit it"),
        (f"hub:{REPO}@{'0' * 40}", r"no revision '0{40}'; omit it"),
        (f"hub:{REPO}:fr/*.jsonl", r"no such file or folder: .*/fr; see http.*/tree/main"),
        (f"hub:{REPO}:en/*.parquet", r"3 files under en, but none matches 'en/\*.parquet'; see http"),
        (f"hub:{REPO}:pictures", r"no readable files: found 1 with the suffixes .png, expected .*\.parquet.* A glob"),
        ("hub:nobody", r"expected hub:NAMESPACE/NAME"),
        ("hub:a/b/c", r"expected hub:NAMESPACE/NAME"),
        ("hub:a b/c..d", r"'a b/c..d' is not a valid dataset name"),
    ],
)
def test_missing_source_raises_without_retry(hub: HubServer, spec: str, message: str) -> None:
    hub.add_dataset(REPO, FILES)
    with pytest.raises(UserError, match=message) as caught:
        find_source(spec)
    assert not isinstance(caught.value, UnreachableError), "a fallback would be taken for a typing error"
    assert len(hub.requests) <= 3, "asked again for what is not there"


@pytest.mark.parametrize("status", [429, 503])
def test_busy_hub_retries(hub: HubServer, status: int, no_waiting: None) -> None:
    hub.add_dataset(REPO, FILES)
    hub.fail_next("/revision/main", status=status)
    hub.fail_next("/tree/", status=status, times=2)
    hub.fail_next("cursor=", status=status, retry_after=None)
    assert len(names(f"hub:{REPO}:en")) == 3


def test_listing_cached(hub: HubServer) -> None:
    hub.add_dataset(REPO, FILES)
    config = DataConfig(source=f"hub:{REPO}:en/*.gz")
    first = make_spec(config)
    hub.add_dataset(REPO, {"en/new.jsonl.gz": b"new"})
    hub.requests.clear()
    hub.down(None)
    assert make_spec(config).folder == first.folder
    assert hub.requests == []


def test_spec_independent_of_endpoint(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add_dataset(REPO, FILES)
    config = DataConfig(source=f"hub:{REPO}:en/*.gz")
    here = make_spec(config)
    with HubServer() as mirror, mirror.reached(monkeypatch, tmp_path / "other"):
        mirror.add_dataset(REPO, FILES)
        monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "elsewhere"))
        there = make_spec(config)
        assert mirror.requests
    assert there.describe() == here.describe()
    assert there.source.files == here.source.files


def test_similar_globs_cached_separately(hub: HubServer) -> None:
    hub.add_dataset(REPO, {"en.jsonl": b"1", "en/a.jsonl": b"2", "token.jsonl": b"3"})
    assert names(f"hub:{REPO}:en") == ["en/a.jsonl"]
    assert names(f"hub:{REPO}:*en*") == ["en.jsonl", "en/a.jsonl", "token.jsonl"]
    assert names(f"hub:{REPO}:en?jsonl") == ["en.jsonl"]
    assert names(f"hub:{REPO}:{'*' * 300}") == ["en.jsonl", "en/a.jsonl", "token.jsonl"]


def test_damaged_listing_raises(hub: HubServer, temp_data: Path) -> None:
    hub.add_dataset(REPO, FILES)
    names(f"hub:{REPO}")
    (kept,) = (temp_data / "listings").iterdir()
    kept.write_text(kept.read_text()[:-20])
    with pytest.raises(UserError, match=f"the listing {kept} is damaged .*; delete it"):
        names(f"hub:{REPO}")
    kept.unlink()
    (temp_data / "listings").rmdir()
    (temp_data / "listings").write_text("a file where a folder belongs")
    with pytest.raises(UserError, match=r"cannot read .*listings.*: Not a directory"):
        names(f"hub:{REPO}")


def test_token_sent_only_to_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubServer() as mirror:
        urls = [mirror.add_plain(f"{i}.json.gz", b"x" * i) for i in (1, 2)]
        hub.add_dataset("allenai/dolma", {"urls/v1_6-sample.txt": "\n".join(urls).encode()})
        find_source("dolma-sample")
        assert [one.authorization for one in mirror.requests] == [None] * 3
    # The content delivery network is another host too: a signature in its URL is what it goes by.
    seen = {(one.path.split("/")[1], one.authorization) for one in hub.requests}
    assert seen == {("datasets", "Bearer hf_secret"), ("cdn", None)}


def test_pagination_stays_on_configured_endpoint(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror may pass on Link headers with the Hub's own address."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add_dataset(REPO, FILES)
    with HubServer() as elsewhere:
        reply = hub._page
        monkeypatch.setattr(
            hub,
            "_page",
            lambda *arguments: reply(*arguments[:3], arguments[3].replace(hub.endpoint, elsewhere.endpoint)),
        )
        assert len(names(f"hub:{REPO}:en")) == 3
        assert elsewhere.requests == []


def test_url_listing_includes_size_and_version(hub: HubServer) -> None:
    urls = [hub.add_plain(f"v1/{i}.json.gz", b"x" * i) for i in (1, 2, 3)]
    hub.add_dataset("a/b", {"urls.txt": "\n".join(["", *urls, urls[0], "# no url"]).encode()})
    hub.fail_next("v1/2", method="HEAD")
    found = list_urls("a/b", "urls.txt")
    assert [(file.name, file.url, file.size_bytes) for file in found] == [
        (f"plain/v1/{i}.json.gz", url, i) for i, url in enumerate(urls, 1)
    ]
    assert found[0].digest.startswith(f"url:{urls[0]} 1 ")
    assert hashlib.md5(b"x").hexdigest() in found[0].digest


@pytest.mark.parametrize("status", [None, 503, 404])
def test_dolma_outage_suggests_c4(hub: HubServer, no_waiting: None, status: int | None) -> None:
    with HubServer() as mirror:
        hub.add_dataset("allenai/dolma", {"urls/v1_6-sample.txt": mirror.add_plain("a.json.gz", b"x").encode()})
        hub.add_dataset("allenai/c4", {"en/c4-train.00000-of-01024.json.gz": b"x"})
        mirror.down(status)
        config = DataConfig(source="dolma-sample")
        with pytest.raises(UnreachableError, match=r"^Dolma cannot be reached: 127.0.0.1 .*C4 .*--fallback c4"):
            resolve(config)
        assert len(mirror.requests) <= 3, "one question is enough where nobody answers"
        assert resolve(replace(config, fallback="c4")).source.name == "c4"


def test_missing_dolma_suggests_c4(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_dataset("allenai/c4", {"en/c4-train.00000-of-01024.json.gz": b"x"})
    with pytest.raises(UnreachableError, match=r"Dolma cannot be reached: the Hub has no dataset 'allenai/dolma'.*C4"):
        find_source("dolma")
    assert resolve(DataConfig(source="dolma", fallback="c4")).source.name == "c4"
    assert re.search(r"Dolma cannot be reached(.|\n)*using c4 instead", capsys.readouterr().err)


def test_full_outage_raises_unreachable(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    hub.down(503, retry_after=None)
    message = rf"the Hub at {hub.endpoint} does not answer .*check the network, a proxy \(HTTPS_PROXY\), HF_ENDPOINT"
    for source in ("c4", "fineweb-edu-10bt", "dolma", f"hub:{REPO}"):
        waited.clear()
        with pytest.raises(UnreachableError, match=message):
            resolve(DataConfig(source=source))
        assert sum(waited) < 10
    waited.clear()
    with socket.socket() as unused:  # nobody listens, and no other program gets the port meanwhile
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UnreachableError, match=r"does not answer .*Connection refused.*HF_ENDPOINT"):
            resolve(DataConfig(source="dolma", fallback="c4"))
    assert sum(waited) < 20, "Dolma's and C4's"


def test_unresponsive_hub_times_out(hub: HubServer, monkeypatch: pytest.MonkeyPatch, no_waiting: None) -> None:
    monkeypatch.setattr(hub_listing, "_TIMEOUTS_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UnreachableError, match=r"does not answer .*timed out"):
            list_hub(REPO, "0" * 40, "")


def test_outage_not_cached(hub: HubServer, temp_data: Path, no_waiting: None) -> None:
    hub.add_dataset(REPO, FILES)
    hub.fail_next("cursor=", times=4)
    with pytest.raises(UnreachableError):
        names(f"hub:{REPO}")
    assert not list(temp_data.rglob("*.json"))
    assert len(names(f"hub:{REPO}")) == 4
    (kept,) = (temp_data / "listings").iterdir()
    assert len(json.loads(kept.read_text())["files"]) == 6


def test_concurrent_processes_request_once(hub: HubServer, temp_data: Path) -> None:
    """As the ranks of a first start do."""
    hub.add_dataset(REPO, FILES)
    children, ready = [], os.pipe()
    for _ in range(6):
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.close(ready[1])
                os.read(ready[0], 1)  # all at once
                code = 0 if len(names(f"hub:{REPO}")) == 4 else 1
            finally:  # never back into pytest
                os._exit(code)
        children.append(child)
    os.close(ready[1])
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    paths = [request.path for request in hub.requests]
    assert len(paths) == len(set(paths)), "a page was asked for twice"
    assert not list(temp_data.rglob("*.tmp"))


@pytest.mark.parametrize(
    "endpoint", ["mirror.example", "localhost:8080", "https://", "ftp://mirror.example", "//mirror"]
)
def test_invalid_endpoint_raises_without_retry(endpoint: str, temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By everything that sends requests to the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    for ask in (
        lambda: find_source(f"hub:{REPO}"), lambda: find_source("dolma"), lambda: load_questions("piqa"), check_token,
        lambda: import_model.resolve_source("someone/some-model", None, print),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"HF_ENDPOINT is '{re.escape(endpoint)}', expected a complete address"):
            ask()
