"""Preparations in real processes: killed, interrupted, two at once, on a full disk. Whole or nothing, every time."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from myllm.config import DataConfig
from myllm.data.prepare import prepare
from myllm.data.shards import Dataset
from myllm.errors import UserError

if TYPE_CHECKING:
    from conftest import Preparations

Hashes = Callable[[Path], dict[str, str]]
SETTINGS = {"val_tokens": 5_000, "shard_tokens": 200_000}


@pytest.fixture(scope="session")
def big_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4.4 MB in 24 files: three units, and a second or so of work."""
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
        return hashes(prepare_big(big_corpus, workers=1).folder)


def prepare_big(corpus: Path, workers: int) -> Dataset:
    return prepare(DataConfig(source=f"files:{corpus}", workers=workers, **SETTINGS), progress=False)


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str]:
    _, errors = process.communicate(timeout=timeout_s)
    return process.returncode, errors


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.usefixtures("temp_data")
def test_same_bytes_from_any_number_of_workers(
    workers: int, big_corpus: Path, undisturbed: dict[str, str], hashes: Hashes
) -> None:
    assert hashes(prepare_big(big_corpus, workers).folder) == undisturbed


def test_killed_at_any_moment(
    big_corpus: Path, preparations: "Preparations", undisturbed: dict[str, str], hashes: Hashes
) -> None:
    """SIGKILL when the lock, a worker, a unit file, a shard or the manifest is just there, and at random."""
    chance = random.Random()
    moments: list[Callable[[], object]] = [
        lambda: list(preparations.datasets.glob(".*.lock")),
        lambda: preparations.workers(),
        lambda: list(preparations.datasets.glob(".partial-*/units/000001.bin")),
        lambda: list(preparations.datasets.glob(".partial-*/train_00002.npy")),
        lambda: time.sleep(chance.uniform(0.3, 2.5)) or True,
    ]
    for number, moment in enumerate(moments):
        process = preparations.start(source=f"files:{big_corpus}", workers=2, **SETTINGS)
        preparations.wait_for(lambda moment=moment, process=process: process.poll() is not None or moment())
        process.kill()
        process.wait()
        preparations.wait_for(lambda: not preparations.processes())  # the workers are gone too
        finished = [name for name in preparations.left() if not name.startswith(".partial-")]
        if number < len(moments) - 1:
            assert finished == []
        elif finished:  # the random moment was after the end
            break
    code, errors = finish(preparations.start(source=f"files:{big_corpus}", workers=2, **SETTINGS))
    assert code == 0, errors
    [name] = preparations.left()
    assert hashes(preparations.datasets / name) == undisturbed


def test_a_killed_parent_leaves_no_worker_behind(long_file: Path, preparations: "Preparations") -> None:
    process = preparations.start(source=f"files:{long_file}", workers=2)
    preparations.wait_for(lambda: list(preparations.datasets.glob(".partial-*/units/*.bin")))
    assert preparations.workers()
    process.kill()
    process.wait()
    preparations.wait_for(lambda: not preparations.processes(), timeout_s=5)


@pytest.mark.parametrize("whole_group", [True, False], ids=["Ctrl-C", "kill -INT"])
def test_interrupted_it_stops_at_once_and_leaves_nothing(
    whole_group: bool, long_file: Path, preparations: "Preparations"
) -> None:
    process = preparations.start(source=f"files:{long_file}", workers=2)
    preparations.wait_for(lambda: [p for p in preparations.datasets.glob(".partial-*/units/*") if p.stat().st_size])
    started = time.monotonic()
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert time.monotonic() - started < 5  # the file alone takes longer
    assert code in (-signal.SIGINT, 130)
    assert "Process Spawn" not in errors, "a worker complained"
    assert preparations.left() == []
    preparations.wait_for(lambda: not preparations.processes())


def test_two_at_once_make_one_data_set(
    big_corpus: Path, preparations: "Preparations", undisturbed: dict[str, str], hashes: Hashes
) -> None:
    pair = [preparations.start(source=f"files:{big_corpus}", workers=1, **SETTINGS) for _ in range(2)]
    for process in pair:
        assert finish(process)[0] == 0
    [name] = preparations.left()
    assert hashes(preparations.datasets / name) == undisturbed


# A limit on a file's size fails a write as a full disk does, and needs no root.
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}));"


def test_a_full_disk_ends_with_a_clear_message_and_code_2(big_corpus: Path, preparations: "Preparations") -> None:
    code = LIMIT.format(1_000) + "import sys; from myllm.cli import main; main(sys.argv[1:])"
    status, errors = finish(preparations.python("-c", code, "data", "prepare", f"files:{big_corpus}"))
    assert status == 2
    assert "no room to write the data set" in errors
    assert "Traceback" not in errors
    assert preparations.left() == []


def test_room_that_runs_out_when_the_shards_are_written(big_corpus: Path, preparations: "Preparations") -> None:
    process = preparations.start(setup=LIMIT.format(1_500_000), source=f"files:{big_corpus}", workers=2)
    code, errors = finish(process)
    assert code == 1
    assert "user error: no room to write" in errors
    assert preparations.left() == []


def test_a_killed_worker_is_a_clear_message(long_file: Path, preparations: "Preparations") -> None:
    process = preparations.start(source=f"files:{long_file}", workers=1)
    preparations.wait_for(lambda: [p for p in preparations.datasets.glob(".partial-*/units/*") if p.stat().st_size])
    for worker in preparations.workers():
        worker.kill()
    code, errors = finish(process)
    assert code == 1
    assert "user error: a worker process died" in errors
    assert preparations.left() == []


def test_a_fault_in_a_worker_names_the_file(tmp_path: Path, temp_data: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a"}\n' * 5 + ("oops\n" if number == 2 else ""))
    with pytest.raises(UserError, match=r"2\.jsonl, line 6: not valid JSON"):
        prepare(DataConfig(source=f"files:{tmp_path}/*.jsonl", workers=2), progress=False)
    assert [path for path in (temp_data / "datasets").iterdir() if path.suffix != ".lock"] == []
    assert not [child for child in psutil.Process().children() if "--multiprocessing-fork" in child.cmdline()]
