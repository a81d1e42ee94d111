"""The downloads of a whole preparation: few on the disk at a time, none left, none twice, whatever interrupts it."""

import gzip
import json
import os
import random
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.hub_server import HubServer

from myllm.config import DataConfig
from myllm.data.prepare import prepare as preparing
from myllm.data.prepare import work_items
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.scheduler import WorkScheduler
from myllm.data.prepare.workers import Downloads, Workers
from myllm.data.sources.source import SourceFile
from myllm.errors import UserError

MANY = {"source": "hub:a/b:data/*", "val_tokens": 500, "workers": 1, "small_bytes": 1}


def fetched(hub: HubServer) -> list[str]:
    """Names of the files whose bytes were sent, each as often as it was asked for."""
    return sorted(one.path.split("?")[0].split("/", 5)[5] for one in hub.seen("/cdn/"))


def downloads_in(folder: Path, suffix: str | tuple[str, ...] = ".gz") -> list[Path]:
    """Downloads below a folder. Unlike Path.rglob, os.walk lets folders vanish meanwhile. A file that is being
    downloaded is a folder of that name and ".part"."""
    found = [Path(parent, name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]
    return sorted(path for path in found if path.name.endswith(suffix))


def add_many(hub: HubServer, count: int = 12) -> list[str]:
    """A repository of some files, of which each makes an item where `small_bytes` is 1."""
    chance, files = random.Random(1), {}
    for number in range(count):
        rows = [{"text": "été 日本 " + " ".join(str(chance.randrange(10**6)) for _ in range(300))} for _ in range(60)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files[f"data/train-{number:05d}.jsonl.gz"] = gzip.compress(lines.encode(), mtime=0)
    hub.add_dataset("a/b", files)
    return sorted(files)


def test_concurrent_downloads_limited(hub: HubServer, started: Any, temp_data: Path) -> None:
    names, most, over = add_many(hub), 0, threading.Event()
    hub.hold("/cdn/", 1_000)

    def watch() -> None:
        nonlocal most
        before: set[str] = set()
        while not over.wait(0.005):
            now = {path.name.removesuffix(".part") for path in downloads_in(temp_data, (".gz", ".part"))}
            # A look takes a while: what it sees need not have been there together. None is downloaded twice, so what
            # two looks see was there all the time between them.
            most, before = max(most, len(before & now)), now
            if most:
                hub.release()

    watching = threading.Thread(target=watch)
    watching.start()
    process = started.start(**MANY)
    _, errors = process.communicate(timeout=240)
    over.set()
    watching.join()
    assert process.returncode == 0, errors
    assert fetched(hub) == names
    assert 0 < most <= 2 * MANY["workers"] + Downloads.AHEAD_FILES
    assert [path for path in temp_data.rglob("*") if "downloads" in path.parts and path.is_file()] == []


@pytest.mark.parametrize(("kind", "most"), [(".jsonl", Downloads.AHEAD_FILES), (".json.gz", 10)])
def test_prefetch_limited_for_large_files(kind: str, most: int, tmp_path: Path) -> None:
    """Eight items under way and two ahead: of few large files where they are read in parts, else of ten."""
    files = [SourceFile(f"{i}{kind}", f"https://x/{i}", "jsonl", 34 * work_items.PART_BYTES, "") for i in range(40)]
    found, fetched = work_items.make_work_items(files, True, 0), set()
    downloads = SimpleNamespace(start=lambda file: fetched.add(file.name))
    spec = SimpleNamespace(work_items=found, config=DataConfig(), tokenizer=SimpleNamespace(file="r50k_base"))
    scheduler = WorkScheduler(spec, tmp_path, Workers(4, None, downloads))
    scheduler._start_downloads()
    assert len(fetched) == most


def test_target_tokens_limits_downloads(hub: HubServer, started: Any) -> None:
    names = add_many(hub)
    process = started.start(**MANY, target_tokens=3_000)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert set(fetched(hub)) < set(names)
    assert len(fetched(hub)) <= 2 + 2 * MANY["workers"] + Downloads.AHEAD_FILES


def test_kept_downloads_reused_for_other_settings(hub: HubServer, in_process: None, temp_data: Path) -> None:
    names = add_many(hub, 4)
    first = {"source": "hub:a/b:data/*", "val_tokens": 500, "workers": 1}
    prepare(DataConfig(**first, keep_downloads=True), progress=False)
    kept = downloads_in(temp_data / "downloads")
    assert [path.relative_to(temp_data / "downloads").parts[1:] for path in kept] == [
        tuple(n.split("/")) for n in names
    ]
    hub.down()
    for settings in ({"shard_tokens": 999}, {"shuffle_seed": 5, "keep_downloads": True}):
        prepare(DataConfig(**first | settings), progress=False)
        assert downloads_in(temp_data / "downloads") == kept
    assert fetched(hub) == names


def test_prepared_source_works_offline(hub: HubServer, in_process: None) -> None:
    add_many(hub, 2)
    config = DataConfig(source="hub:a/b:data/*", val_tokens=500, workers=1)
    first = prepare(config, progress=False)
    hub.requests.clear()
    hub.down(None)
    assert prepare(config, progress=False).folder == first.folder
    assert hub.requests == []


@pytest.mark.parametrize("workers", [(1, 2, 1), (2, 1, 2)])
def test_identical_bytes_after_kills_and_worker_changes(
    hub: HubServer, started: Any, hashes: Callable[[Path], dict[str, str]], in_process: None, workers: tuple[int, ...],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temp_data: Path,
) -> None:  # fmt: skip
    """Killed in the middle of a download, and again once some tokens are sealed."""
    names = add_many(hub, 6)
    files = work_items.order_files(preparing.resolve(DataConfig(source=MANY["source"])).source.files, True, 0)
    size = sum(file.size_bytes for file in files)

    def kill_when(moment: Callable[[], object], count: int) -> None:
        process = started.start(**MANY | {"workers": count}, shard_tokens=5_000)
        started.wait_for(lambda: moment() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        started.kill(process)

    hub.hold("/cdn/", size // 12)  # half of each
    kill_when(lambda: downloads_in(temp_data, ".part"), workers[0])
    hub.release()
    hub.hold(f"/cdn/(?!.*{files[0].name.split('/')[-1]})", size // 10)
    kill_when(
        lambda: downloads_in(temp_data, ".part") and (started.seen("work/0*.npz") or started.seen("train_*.npy")),
        workers[1],
    )
    hub.release()
    process = started.start(**MANY | {"workers": workers[-1]}, shard_tokens=5_000)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert {one.split("/")[-1] for one in fetched(hub)} == {name.split("/")[-1] for name in names}
    found = hashes(started.folder)
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "undisturbed"))
    monkeypatch.setattr("myllm.data.prepare.work_items.SMALL_BYTES", 1)
    settings = {name: value for name, value in MANY.items() if name != "small_bytes"}
    whole = prepare(DataConfig(**settings, shard_tokens=5_000), progress=False)
    assert hashes(whole.folder) == found


def test_full_disk_during_download_raises(hub: HubServer, in_process: None) -> None:
    hub.add_dataset("a/b", {"a.jsonl.gz": np.random.default_rng(1).bytes(1 << 20)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        with pytest.raises(UserError, match=r"no room to write the data set under .*: File too large"):
            prepare(DataConfig(source="hub:a/b", val_tokens=500, workers=1), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
