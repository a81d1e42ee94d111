"""Bytes that changed on the disk, files that are gone or cut short: detected by content, and never trusted."""

import os
import re
import shutil
from pathlib import Path

import pytest
from support import warm_start
from support.fault_runs import Ended, Forks, Goes, run_of

from myllm.data.dataset import Dataset

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all


@pytest.fixture(scope="module")
def saved(forks: Forks, config_file: Path, place: Path) -> list[str]:
    """A run stopped at step 6 of 8, with checkpoints at 4 and 6. Returns the files of a checkpoint."""
    assert forks(config_file, "--name", "saved", "--train.max-steps", "6").code == 0
    newest = run_of(place, "saved").checkpoints / "step_00000006"
    return sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())


def flip(path: Path, at: float = 0.5) -> None:
    """Change one bit, as a failing disk does: the file keeps its size and date."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGE = {"flipped": flip, "cut short": cut, "missing": Path.unlink}


def test_every_file_of_a_checkpoint(
    saved: list[str], forks: Forks, config_file: Path, place: Path, goes_on: Goes
) -> None:
    """Each damaged in turn: the run says so, takes the checkpoint before, and ends as if nothing had been."""
    assert {"model.pt", "manifest.json", "state.json"} & set(saved), "the folder holds what it should"
    for number, file in enumerate(saved):
        # Every kind of damage to some file, and some kind to every file, without every pair of them.
        for kind in list(DAMAGE) if file == "manifest.json" else [list(DAMAGE)[number % 3], "flipped"]:
            name = f"{kind}-{file}".replace("/", "-").replace(" ", "-")
            shutil.copytree(run_of(place, "saved").root, run_of(place, name).root)
            DAMAGE[kind](run_of(place, name).checkpoints / "step_00000006" / file)
            goes_on(name)
            log = run_of(place, name).log.read_text()
            named = "" if file == "manifest.json" else re.escape(file)  # then it may be another file that looks wrong
            assert re.search(rf"skipping .*step_00000006: .*{named}", log), log
            assert re.search(r"resuming from .*step_00000004 at step 4", log)
            shutil.rmtree(run_of(place, name).root)


def test_all_checkpoints_damaged(saved: list[str], forks: Forks, config_file: Path, place: Path) -> None:
    """It never starts over by itself."""
    run = run_of(place, "all-damaged")
    shutil.copytree(run_of(place, "saved").root, run.root)
    for folder in run.checkpoints.iterdir():
        (folder / "manifest.json").unlink()
    ended = forks(config_file, "--name", "all-damaged")
    assert ended.code == 2
    assert "--train.fresh" in ended.said
    assert "Traceback" not in ended.said, ended.said


def repair(dataset: Dataset) -> None:
    done = warm_start.run("-m", "myllm", "data", "verify", dataset.folder, "--repair")
    assert done.returncode == 0, done.stderr


def refused(ended: Ended, dataset: Dataset, shard: str) -> None:
    assert ended.code == 2, ended.said
    assert shard in ended.said
    assert f"`myllm data verify {dataset.folder} --repair`" in ended.said
    assert "Traceback" not in ended.said, ended.said


def test_shards(forks: Forks, config_file: Path, place: Path, dataset: Dataset, goes_on: Goes) -> None:
    """Training stops before it reads a damaged shard, names it, and resumes after the repair."""
    shards = sorted(path.name for path in dataset.folder.glob("*.npy") if path.name != "spans.npy")
    assert len(shards) > 3
    for number, (kind, shard) in enumerate(zip(("flipped", "cut short", "missing", "flipped"), shards, strict=False)):
        name = f"shard-{number}"
        assert forks(config_file, "--name", name, "--train.max-steps", "4").code == 0
        sound = (dataset.folder / shard).read_bytes()
        DAMAGE[kind](dataset.folder / shard)
        refused(forks(config_file, "--name", name), dataset, shard)
        assert '"step": 5' not in run_of(place, name).metrics.read_text(), "it was trained on"
        if number == 0:
            repair(dataset)
            assert (dataset.folder / shard).read_bytes() == sound
        (dataset.folder / shard).write_bytes(sound)
        goes_on(name)
