"""Preparations in real processes: killed, interrupted, two at once, on a full disk. The next one always continues."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from myllm.config import DataConfig
from myllm.data.dataset import Dataset
from myllm.data.prepare import work_items
from myllm.data.prepare.prepare import prepare
from myllm.errors import UserError

if TYPE_CHECKING:
    from conftest import Preparations

Hashes = Callable[[Path], dict[str, str]]
SETTINGS = {"val_tokens": 5_000, "shard_tokens": 100_000, "small_bytes": 300_000}


@pytest.fixture(scope="session")
def big_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4.4 MB in 24 files: with SETTINGS twelve items, thirteen shards, and a second or so of work."""
    folder = tmp_path_factory.mktemp("big") / "big"
    folder.mkdir()
    chance = random.Random(2)
    words = [f"{a}{b}" for a in ("river", "stone", "light", "salt") for b in ("", "s", "ing", " and", ", the", ".\n")]
    for number in range(24):
        (folder / f"{number:02d}.py").write_text(" ".join(chance.choices(words, k=26_000)))
    return folder


@pytest.fixture(scope="session")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that keeps a worker busy for many seconds."""
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    line = json.dumps({"text": "the river ran under the old stone bridge, and the children sang. " * 40}) + "\n"
    path.write_text(line * 40_000)
    return path


@pytest.fixture(scope="session")
def undisturbed(big_corpus: Path, tmp_path_factory: pytest.TempPathFactory, hashes: Hashes) -> dict[str, str]:
    """The files of a preparation that nobody disturbed, by one worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(tmp_path_factory.mktemp("undisturbed")))
        return hashes(prepare_big(big_corpus, 1).folder)


def prepare_big(corpus: Path, workers: int) -> Dataset:
    settings = {name: value for name, value in SETTINGS.items() if name != "small_bytes"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_items, "SMALL_BYTES", SETTINGS["small_bytes"])
        return prepare(DataConfig(source=f"files:{corpus}", workers=workers, **settings), progress=False)


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[int, str]:
    _, errors = process.communicate(timeout=timeout_s)
    return process.returncode, errors


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.usefixtures("temp_data")
def test_bytes_independent_of_worker_count(
    workers: int, big_corpus: Path, undisturbed: dict[str, str], hashes: Hashes
) -> None:
    assert hashes(prepare_big(big_corpus, workers).folder) == undisturbed


MOMENTS = [
    "settings.json", "work/.*.tmp", "work/000000.bin", "work/000001.npz", "val_00000.npy", "progress.json",
    ".train_0000?.npy.*.tmp", "train_00002.npy", "work/000007.npz", "train_00008.npy", "train_00011.npy", "spans.npy",
    ".manifest.json.*.tmp", "manifest.json",
]  # fmt: skip
"""When a file of such a name is there; beside those: the lock, a worker, and a random moment."""


def moment(preparations: "Preparations", chance: random.Random) -> Callable[[], object]:
    at = time.monotonic() + chance.uniform(0.2, 1.2)
    found = chance.choice([*MOMENTS, *MOMENTS, "lock", "worker", "random", "random", "random"])
    if found == "lock":
        return lambda: list(preparations.datasets.glob(".*.lock"))
    if found == "worker":
        return preparations.workers
    there = set(preparations.seen(found))
    return lambda: set(preparations.seen(found)) - there or (found == "random" and time.monotonic() > at)


@pytest.mark.slow
@pytest.mark.parametrize("_round", range(4))
def test_killed_preparation_resumes_with_identical_bytes(
    _round: int, big_corpus: Path, preparations: "Preparations", undisturbed: dict[str, str], hashes: Hashes
) -> None:
    """At least 20 kills in four rounds: of the parent, of all, of one worker, and often at once again, with another
    number of workers each time. Finished items and shards are not written again, and the result is that of an
    undisturbed preparation.
    """
    seed = random.randrange(10**6)
    chance, kills, finished = random.Random(seed), 0, 0
    while kills < 5 or not finished:
        whom = chance.choice(["parent", "parent", "group", "worker"])
        before = sealed(preparations)
        process = preparations.start(source=f"files:{big_corpus}", workers=chance.randint(1, 4), **SETTINGS)
        is_time = moment(preparations, chance) if kills < 6 else lambda: False
        preparations.wait_for(lambda process=process, is_time=is_time: process.poll() is not None or is_time())
        if process.poll() is None:
            preparations.kill(process, whom)
            kills += 1
            assert not {
                path for path, identity in sealed(preparations).items() if before.get(path, identity) != identity
            }, seed
        if process.returncode == 0:
            assert hashes(preparations.folder) == undisturbed, seed
            assert not [path for path in preparations.folder.iterdir() if path.is_dir()], seed
            finished += 1
            shutil.rmtree(preparations.folder)
        elif whom == "worker" and process.returncode > 0:
            assert "user error: a worker process died" in finish(process)[1]
    preparations.wait_for(lambda: not preparations.processes())


def sealed(preparations: "Preparations") -> dict[Path, tuple[int, int]]:
    """Finished items and shards, with inode and time, which differ if one is written again."""
    found = preparations.seen("work/*.npz")
    for progress in preparations.seen("progress.json"):
        shards = json.loads(progress.read_text())["shards"]
        found += [progress.parent / shard["file"] for shard in shards]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found if path.exists()}


def test_killed_parent_leaves_no_workers(long_file: Path, preparations: "Preparations") -> None:
    process = preparations.start(source=f"files:{long_file}", workers=2)
    preparations.wait_for(lambda: preparations.seen("work/.*.tmp"))
    assert preparations.workers()
    process.kill()
    process.wait(timeout=240)
    preparations.wait_for(lambda: not preparations.processes())


STOP_A_WORKER = """
import multiprocessing, os, signal
from myllm.data.prepare import workers as pools
pools.PATIENCE_S = 0.5
shut_down = pools._shut_down
def stopping(*arguments):
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    shut_down(*arguments)
pools._shut_down = stopping
"""


def test_hanging_worker_does_not_block_preparation(
    big_corpus: Path, preparations: "Preparations", undisturbed: dict[str, str], hashes: Hashes
) -> None:
    """As one does that waits for a lock of another that was killed."""
    process = preparations.start(STOP_A_WORKER, source=f"files:{big_corpus}", workers=2, **SETTINGS)
    code, errors = finish(process)
    assert code == 0, errors
    assert hashes(preparations.folder) == undisturbed
    preparations.wait_for(lambda: not preparations.processes())


@pytest.mark.parametrize("whole_group", [True, False], ids=["Ctrl-C", "kill -INT"])
def test_interrupt_stops_preparation_promptly(whole_group: bool, long_file: Path, preparations: "Preparations") -> None:
    process = preparations.start(source=f"files:{long_file}", workers=2)
    preparations.wait_for(preparations.writes_tokens)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code in (-signal.SIGINT, 130)
    assert "Process Spawn" not in errors, "a worker complained"
    preparations.wait_for(lambda: not preparations.processes())
    assert (preparations.folder / "work").is_dir()  # far from the end of so long a file
    assert not preparations.seen("train_*.npy")
    assert not preparations.seen("work/.*.tmp"), "half an item is left"


def test_concurrent_preparations_share_dataset(
    big_corpus: Path, preparations: "Preparations", undisturbed: dict[str, str], hashes: Hashes
) -> None:
    """The second continues where the first was killed."""
    first, second = (preparations.start(source=f"files:{big_corpus}", workers=1, **SETTINGS) for _ in range(2))
    preparations.wait_for(lambda: preparations.seen("train_00001.npy"))
    first.kill()
    codes = {finish(process)[0] for process in (first, second)}
    assert codes <= {0, -signal.SIGKILL}
    if codes == {-signal.SIGKILL}:
        pytest.fail("nobody finished")
    assert hashes(preparations.folder) == undisturbed


# A limit on a file's size fails a write as a full disk does, and needs no root.
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}));"


def test_full_disk_exits_with_code_2(big_corpus: Path, preparations: "Preparations") -> None:
    code = LIMIT.format(1_000) + "import sys; from myllm.cli.main import main; main(sys.argv[1:])"
    status, errors = finish(preparations.python("-c", code, "data", "prepare", f"files:{big_corpus}"))
    assert status == 2
    assert "no room to write the data set" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("limit", [100, 20_000, 199_000])
def test_preparation_resumes_after_full_disk(
    limit: int, big_corpus: Path, preparations: "Preparations", undisturbed: dict[str, str], hashes: Hashes
) -> None:
    """At the settings, at an item, at a training shard: afterwards the same command finishes."""
    code, errors = finish(preparations.start(LIMIT.format(limit), source=f"files:{big_corpus}", workers=2, **SETTINGS))
    assert code == 1
    assert "user error: no room to write" in errors
    assert "Traceback" not in errors
    assert not preparations.seen("manifest.json")
    assert all(path.stat().st_size > 100_000 for path in preparations.seen("*.npy")), "half a shard has a name"
    code, errors = finish(preparations.start(source=f"files:{big_corpus}", workers=2, **SETTINGS))
    assert code == 0, errors
    assert hashes(preparations.folder) == undisturbed


def test_killed_worker_reports_user_error(long_file: Path, preparations: "Preparations") -> None:
    process = preparations.start(source=f"files:{long_file}", workers=1)
    preparations.wait_for(preparations.writes_tokens)
    for worker in preparations.workers():
        worker.kill()
    code, errors = finish(process)
    assert code == 1
    assert "user error: a worker process died" in errors
    preparations.wait_for(lambda: not preparations.processes())  # multiprocessing's resource tracker ends a bit later


def test_missing_source_file_raises_until_restored(
    big_corpus: Path, tmp_path: Path, temp_data: Path, undisturbed: dict[str, str], hashes: Hashes
) -> None:
    copy = shutil.copytree(big_corpus, tmp_path / "big")
    found = work_items.order_files
    with pytest.MonkeyPatch.context() as patch:
        # After the listing, before it is read.
        patch.setattr(work_items, "order_files", lambda *a: ((copy / "07.py").unlink(missing_ok=True), found(*a))[1])
        with pytest.raises(UserError, match=r"07\.py no longer exists; restore it"):
            prepare_big(copy, 2)
    shutil.copyfile(big_corpus / "07.py", copy / "07.py")
    actual = hashes(prepare_big(copy, 3).folder)
    different = {name for name in undisturbed if actual[name] != undisturbed[name]}
    assert different == {"settings.json"}, "where the source lies"
    assert not multiprocessing.active_children()
