"""Oddities of a machine: a signal in an evaluation, a clock that jumps back, a folder that is taken, or read-only."""

import json
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.fault_runs import Forks, Goes, Record, assert_tidy, record, run_of

from myllm.checkpoint.layout import newest_step
from myllm.data.dataset import Dataset
from myllm.files import file_lock
from myllm.paths import RunPaths

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all


def validation(run: RunPaths) -> dict[int, float]:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_sigterm_during_evaluation_saves_checkpoint(
    told: tuple[int, ...], forks: Forks, config_file: Path, place: Path, goes_on: Goes
) -> None:
    """A scheduler may tell one rank or all."""
    name = f"told-{len(told)}-{told[0]}"
    run = run_of(place, name)
    ended = forks(config_file, "--name", name, on=told, stop_in_evaluation=4)
    assert ended.code == 128 + signal.SIGTERM, ended.said
    assert newest_step(run.checkpoints) == max(record(run)) >= 4
    assert "the same command resumes" in ended.said
    goes_on(name)
    assert validation(run) == validation(run_of(place, "whole"))
    assert len(validation(run)) == 3


def test_second_interrupt_exits_without_saving(forks: Forks, config_file: Path, place: Path, goes_on: Goes) -> None:
    run = run_of(place, "impatient")
    ended = forks(config_file, "--name", "impatient", interrupts=4)
    assert ended.code == 128 + signal.SIGINT, ended.said
    assert newest_step(run.checkpoints) == 2
    assert "Traceback" not in ended.said, ended.said
    goes_on("impatient")


def test_backward_clock_jump(forks: Forks, config_file: Path, place: Path, whole: Record) -> None:
    run = run_of(place, "clock")
    assert forks(config_file, "--name", "clock", "--train.max-steps", "4", clock=3_600).code == 0
    ended = forks(config_file, "--name", "clock", clock=86_400)
    assert ended.code == 0, ended.said
    assert record(run) == whole
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert all(row["step_s"] > 0 and row["data_wait_s"] >= 0 for row in rows if row["kind"] == "train")
    assert_tidy(run.root)


def test_locked_run_folder_is_rejected(forks: Forks, config_file: Path, place: Path, goes_on: Goes) -> None:
    run = run_of(place, "taken")
    run.root.mkdir(parents=True)
    with file_lock(run.root / ".lock"):
        ended = forks(config_file, "--name", "taken")
    assert ended.code == 2
    assert f"error: another process is training in {run.root}; stop it first" in ended.said
    assert "Traceback" not in ended.said, ended.said
    assert [path.name for path in run.root.iterdir()] == [".lock"]
    goes_on("taken")


def test_read_only_run_folder_is_rejected(forks: Forks, config_file: Path, dataset: Dataset) -> None:
    with TemporaryDirectory() as name:
        data = Path(name)
        data.chmod(0o755)
        (data / "datasets").symlink_to(dataset.folder.parent)
        (data / "runs/theirs").mkdir(parents=True)
        (data / "runs/theirs").chmod(0o555)
        ended = forks(config_file, "--name", "theirs", data=data, user=65_534)
        assert ended.code == 2, ended.said
        assert f"error: cannot write the run folder {data / 'runs/theirs'}" in ended.said
        assert "Traceback" not in ended.said, ended.said
        # Before it lost its rights, the process could say that it was starting.
        assert {path.name for path in (data / "runs/theirs").iterdir()} <= {".lock", "heartbeat.json"}
