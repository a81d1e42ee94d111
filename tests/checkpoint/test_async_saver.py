"""Saving beside training: steps go on while files are written, and what goes wrong there is not lost."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import losses, with_train, write_run_config
from training.test_loop import run
from training.test_stop_signals import wait_until

from myllm.checkpoint import format as checkpoint
from myllm.checkpoint import retention
from myllm.checkpoint.async_saver import _check_finite
from myllm.checkpoint.format import Snapshot, load_checkpoint
from myllm.checkpoint.integrity import verify_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import TrainingDiverged, UserError
from myllm.paths import RunPaths
from myllm.training.loop import train

pytestmark = pytest.mark.usefixtures("prepared_data")

DEADLINE_S = 240


@pytest.fixture
def quick(tiny: RunConfig) -> RunConfig:
    """Without what takes time beside training."""
    evals = replace(tiny.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    return replace(tiny, eval=evals)


def test_training_continues_during_checkpoint_write(quick: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write, of step 4, waits until step 7 is logged. Without a thread that would never come."""
    real, metrics, seen = checkpoint.write_checkpoint, RunPaths.of("tiny").metrics, []

    def slow(folder: Path, snapshot: Snapshot, *rest: object) -> Path:
        seen.append(snapshot.state.step)
        pause = threading.Event()
        for _ in range(DEADLINE_S * 50 if snapshot.state.step == 4 else 0):
            if '"step": 7,' in metrics.read_text():
                break
            pause.wait(0.02)
        else:
            assert snapshot.state.step != 4, "training stood still"
        return real(folder, snapshot, *rest)

    plain = run(replace(quick, name="plain"))
    monkeypatch.setattr("myllm.checkpoint.async_saver.write_checkpoint", slow)
    root = run(quick)
    assert seen == [4, 8, 12]
    assert losses(root) == losses(plain)
    for step in (4, 8, 12):  # what was written is the state at its step, not that of when it was written
        one, other = (path / f"checkpoints/step_{step:08d}/manifest.json" for path in (root, plain))
        names = ("weights/__0_0.distcp", "optimizer/__0_0.distcp", "random/rank_00000.pt", "state.json")
        actual, expected = ({name: files(path)[name] for name in names} for path in (one, other))
        assert actual == expected


def files(manifest: Path) -> dict[str, dict[str, object]]:
    return json.loads(manifest.read_text())["files"]


def test_failed_save_stops_run_at_next_step(quick: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.write_checkpoint

    def full(folder: Path, snapshot: Snapshot, *rest: object) -> Path:
        if snapshot.state.step == 8:
            raise UserError("no space to save step 8")
        return real(folder, snapshot, *rest)

    monkeypatch.setattr("myllm.checkpoint.async_saver.write_checkpoint", full)
    told: list[int] = []
    dataset = prepare(quick.data, progress=False)
    with process_group("cpu") as process, pytest.raises(UserError, match="no space to save step 8"):
        train(with_train(quick, max_steps=400), dataset, process, told.append)
    assert max(losses(RunPaths.of("tiny").root)) <= 12  # the next save would have said so too
    assert told == [4]  # only what is whole is handed on
    monkeypatch.setattr("myllm.checkpoint.async_saver.write_checkpoint", real)
    assert losses(run(quick)) == losses(run(replace(quick, name="whole")))


def test_disk_space_checked_before_first_step(quick: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda _: usage(5_000_000))
    with pytest.raises(UserError, match=r"the run needs .* for 4 checkpoints of .* has 5\.0 MB free"):
        run(quick)
    assert not RunPaths.of("tiny").metrics.exists()


HELD = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from myllm import files
import myllm.checkpoint.format as checkpoint
real = checkpoint._finalize
def held(work, final, *rest):
    if final.name == "step_00000008":
        (work.parents[1] / "held").touch()
        until = time.monotonic() + {hold_s}
        while time.monotonic() < until and not (work.parents[1] / "go").exists():
            time.sleep(0.02)
    return real(work, final, *rest)
checkpoint._finalize = held
sys.argv = ["pretrain.py", "--config", {config!r}]
import pretrain
pretrain.main()
"""


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and f'"step": {step}, "tokens"' in (run / "metrics.jsonl").read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    pytest.fail(f"step {step} was never reached")


@pytest.mark.slow
def test_signals_during_checkpoint_write(quick: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """SIGTERM waits for it; SIGKILL leaves the previous one, and the same command resumes from it."""
    config = with_train(quick, max_steps=400, save_every_steps=4, keep_last=3)
    path, root = write_run_config(config, tmp_path / "held.json"), temp_data / "runs/tiny"
    paths = [str(Path(__file__).parents[2])]
    code = HELD.format(paths=paths, hold_s=DEADLINE_S, config=str(path))
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for_step(process, root, 10)
        wait_until((root / "held").exists, process)  # by the thread of step 8
        assert [folder.name for folder in list_checkpoints(root / "checkpoints")] == ["step_00000004"]
        process.send_signal(number)
        (root / "go").touch() if number == signal.SIGTERM else None
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), output
        (root / "held").unlink()
        if number == signal.SIGKILL:
            (root / "metrics.jsonl").write_text("")  # so that the wait above is for new rows
    newest = load_checkpoint(list_checkpoints(root / "checkpoints")[0])
    assert f"stopped after step {newest.state.step}, saved" in output
    assert newest.state.step >= 10
    assert "resuming from" in (root / "log.txt").read_text()
    assert not [fault for folder in list_checkpoints(root / "checkpoints") for fault in verify_checkpoint(folder)]
    assert not [entry for entry in (root / "checkpoints").iterdir() if entry.name.startswith(".")]


def test_finite_check_tolerates_overflowing_sum() -> None:
    _check_finite({("weights", "w"): torch.full((9,), 3e38), ("optimizer", "v"): torch.ones(2, dtype=torch.int64)}, 1)
    _check_finite({}, 1)
    for bad in (math.inf, math.nan):
        with pytest.raises(TrainingDiverged, match="after step 1 the weights v are not finite"):
            _check_finite({("weights", "w"): torch.full((9,), 3e38), ("weights", "v"): torch.tensor([1.0, bad])}, 1)
