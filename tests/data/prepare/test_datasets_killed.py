"""`myllm data prepare datasets:...`, killed at three moments: the same bytes, and nothing that was done is done again.

What is done is counted in every process, workers included, by a log of each rename. Finished downloads, conversions and
items get their names by one.
"""

import csv
import fcntl
import io
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer

pytestmark = pytest.mark.slow
COUNT = 8
HOOK = """
import fcntl, os, time
def logged(rename):
    def call(source, target, **folders):
        place = os.fspath(target).partition(os.environ.get("MYLLM_DATA", "/no folder"))[2]
        with open(os.environ["RENAMES"], "a+") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            while place.endswith(".npz") and is_at_limit(log):
                fcntl.flock(log, fcntl.LOCK_UN)
                time.sleep(0.02)
                fcntl.flock(log, fcntl.LOCK_EX)
            rename(source, target, **folders)
            print(place, file=log, flush=True)
    return call
def is_at_limit(log):
    log.seek(0)
    try:
        with open(os.environ["RENAMES"] + ".limit") as limit:
            return log.read().count(".npz") >= int(limit.read())
    except FileNotFoundError:
        return False
os.rename, os.replace = logged(os.rename), logged(os.replace)
"""
"""Whoever holds the lock of the log knows that no rename is under way, and that it has those done. `RENAMES.limit`: how
many items may be finished."""


@pytest.fixture
def renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of all renames below MYLLM_DATA. Comes first: processes are started with the environment of then."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    monkeypatch.setenv("RENAMES", str(tmp_path / "renames"))
    return tmp_path / "renames"


def texts(number: int) -> list[str]:
    """About 2.1 MB, enough for an item."""
    chance = random.Random(number)
    return [f"{number} été, " + " ".join(str(chance.randrange(10**6)) for _ in range(1_000)) for _ in range(310)]


def csv_of(number: int) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["n", "text"])
    writer.writerows(enumerate(texts(number)))
    return out.getvalue().encode()


@pytest.fixture
def on_hub(hub: HubServer) -> str:
    """CSV files, which only `datasets` reads."""
    hub.add_dataset("own/data", {f"data/{i}.csv": csv_of(i) for i in range(COUNT)})
    return "own/data"


@pytest.fixture
def saved(tmp_path: Path) -> str:
    import datasets

    rows = [{"text": text} for i in range(COUNT) for text in texts(i)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=COUNT)
    return str(tmp_path / "saved")


def command(source: str, workers: int) -> list[str]:
    # In their order, so that a file whose download a test holds up is among the last.
    settings = ["--shard-tokens", "200000", "--val-tokens", "5000", "--no-shuffle-files"]
    return ["-m", "myllm", "data", "prepare", f"datasets:{source}", "--workers", str(workers), *settings]


def kill_when(moment: Callable[[], object], source: str, workers: int, started: Any, renames: Path) -> None:
    process = started.python(*command(source, workers))
    with renames.open("a") as log:

        def is_time() -> bool:
            fcntl.flock(log, fcntl.LOCK_EX)
            if not moment():
                fcntl.flock(log, fcntl.LOCK_UN)
                return process.poll() is not None
            return True

        started.wait_for(is_time)
        assert process.poll() is None, process.communicate()
        started.kill(process, "group")


def finish(source: str, prepared: Any, hashes: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    process = prepared.python(*command(source, 2))
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return hashes(prepared.folder)


def times(named: Counter, suffix: str) -> list[int]:
    """Of files that have their final names: the Hub's client renames those in a folder *.part too."""
    return [count for path, count in sorted(named.items()) if path.endswith(suffix) and ".part/" not in path]


def items(started: Any) -> int:
    return len(started.seen("work/0*.npz"))


@pytest.fixture
def undisturbed(started: Any, tmp_path: Path) -> Any:
    """Preparations with a folder of their own."""
    other = type(started)(tmp_path / "undisturbed")
    yield other
    other.end()


def test_killed_preparation_of_repository(
    renames: Path, on_hub: str, hub: HubServer, started: Any, hashes: Callable, undisturbed: Any, temp_data: Path
) -> None:
    """Killed in a download, with some items finished, and with some shards written."""

    def is_downloading() -> bool:
        return any(name.endswith(".csv.part") for _, folders, _ in os.walk(temp_data) for name in folders)

    for workers, held, moment in (
        (2, "[1-7]", is_downloading),  # the listing reads the beginning of the first
        (1, "[67]", lambda: items(started) >= 2),
        (3, "7", lambda: items(started) >= 5 and started.seen("train_*.npy")),
    ):
        hub.release()
        hub.hold(f"/cdn/.*/{held}.csv", 1_000_000)
        kill_when(moment, on_hub, workers, started, renames)
    hub.release()
    found, named = finish(on_hub, started, hashes), Counter(renames.read_text().splitlines())
    for suffix in (".csv", ".arrow", ".npz"):
        assert times(named, suffix) == [1] * COUNT, named
    assert finish(on_hub, undisturbed, hashes) == found


def test_killed_preparation_of_saved_folder(
    renames: Path, saved: str, started: Any, hashes: Callable, undisturbed: Any
) -> None:
    """Killed after the first item, with some more finished, and with some shards written."""
    limit = renames.with_name("renames.limit")
    for workers, count in ((2, 1), (1, 3), (3, 5)):
        limit.write_text(str(count))
        kill_when(
            lambda count=count: items(started) == count and (count < 5 or started.seen("train_*.npy")),
            saved, workers, started, renames,
        )  # fmt: skip
    limit.unlink()
    found, named = finish(saved, started, hashes), Counter(renames.read_text().splitlines())
    assert times(named, ".npz") == [1] * COUNT
    assert finish(saved, undisturbed, hashes) == found
