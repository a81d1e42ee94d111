"""Trials: runs that a command starts as processes, and never trains twice."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, eval_rows, launch, train_rows, with_train, write_run_config
from support.run_files import train_row, validation_row, write_run

from myllm.cli import trials
from myllm.cli.trials import Share, TrialResult, as_trial, machine_shares, recent_loss, run_trials
from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.files import is_locked
from myllm.paths import RunPaths

PROGRAM = """
import sys
from pathlib import Path
from myllm.cli import trials
from myllm.config import RunConfig, load_config
trials.project_root = lambda: Path(sys.argv[2])
(result,) = trials.run_trials([load_config(Path(sys.argv[1]), RunConfig())])
print(result.loss)
"""
SLOW = f"""
import runpy, time
from pathlib import Path
from myllm.training import loop
advance = loop.advance

def slow_advance(trainer, services, progress):
    if progress.state.step >= {{after}} and Path({{file!r}}).exists():
        time.sleep(0.5)
    advance(trainer, services, progress)

loop.advance = slow_advance
runpy.run_path({str(ROOT / "pretrain.py")!r}, run_name="__main__")
"""


def slow_checkout(folder: Path, after: int) -> Path:
    """Write a pretrain.py whose steps take half a second each after the first ones, as long as this file is there."""
    file = folder / "slow"
    file.touch()
    (folder / "pretrain.py").write_text(SLOW.format(after=after, file=str(file)))
    return file


def with_rate(config: RunConfig, rate: float, name: str) -> RunConfig:
    return replace(config, name=name, optim=replace(config.optim, max_lr=rate))


def run_trial(config: RunConfig) -> TrialResult:
    (result,) = run_trials([config])
    return result


@pytest.mark.slow
def test_trials_match_ordinary_runs(small: RunConfig, tmp_path: Path) -> None:
    pair = [with_rate(small, 3e-3, "low"), with_rate(small, 6e-3, "high")]
    results = {result.name: result for result in run_trials(pair, jobs=2)}
    # An ordinary start of the same config, bit for bit.
    alone = launch("--config", write_run_config(replace(as_trial(pair[0]), name="alone"), tmp_path / "alone.json"))
    assert alone.returncode == 0, alone.stderr
    assert results["low"].loss == eval_rows(RunPaths.of("alone").root, "validation")[-1]["loss"]
    assert results["low"].loss != results["high"].loss
    assert results["low"].tokens == 12 * 128
    for name in results:
        run = RunPaths.of(name)
        assert [row["step"] for row in eval_rows(run.root, "validation")] == [0, 12]
        assert not eval_rows(run.root, "cloze")
        assert not run.checkpoints.exists()
    # Once more: nothing is trained.
    before = RunPaths.of("low").metrics.read_bytes()
    assert run_trial(pair[0]) == results["low"]
    assert RunPaths.of("low").metrics.read_bytes() == before
    with pytest.raises(UserError, match=r"(?s)low was trained with other settings.*optim.max_lr: 0.003 -> 0.01"):
        run_trial(with_rate(small, 0.01, "low"))
    with pytest.raises(UserError, match=r"alone .* is not a trial"):
        run_trial(replace(small, name="alone"))


def test_diverged_trial_returns_but_broken_trial_raises(small: RunConfig) -> None:
    diverged = run_trial(with_rate(small, 1e30, "diverged"))
    assert math.isinf(diverged.loss)
    started = RunPaths.of("diverged").metrics.stat().st_mtime_ns
    assert run_trial(with_rate(small, 1e30, "diverged")) == diverged
    assert RunPaths.of("diverged").metrics.stat().st_mtime_ns == started
    broken = replace(small, name="broken", data=replace(small.data, dataset="absent"))
    with pytest.raises(UserError, match=r"(?s)broken ended with exit code 2:.*absent.*trial\.log"):
        run_trial(broken)


def test_machine_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("myllm.cli.trials.num_threads", lambda: 5)
    assert machine_shares("cpu", 1) == [Share()]
    assert machine_shares("cpu", 2) == [Share(2)] * 2
    assert machine_shares("cpu", 8) == [Share(1)] * 8
    monkeypatch.setattr("myllm.distributed.device_info.cuda_device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert machine_shares("auto", 1) == [Share(gpus=("4", "5", "6", "7"))]
    assert machine_shares("cuda", 3) == [Share(gpus=(name,)) for name in "456"]
    with pytest.raises(UserError, match="--jobs is 5, but there are 4 GPUs"):
        machine_shares("auto", 5)


def test_process_left_behind_may_end_after_it_refused_another(small: RunConfig) -> None:
    config = as_trial(small)
    run = write_run(RunPaths.of("tiny").root, [train_row(12), validation_row(12, 3.0)])
    run.heartbeat.write_text(json.dumps({"exit_code": 0}))
    trial = trials._TrialProcess(config, Share())
    trial.process = SimpleNamespace(poll=lambda: 2)  # pretrain.py found the folder in use; by now it is free
    assert not trial.ended(None)
    assert trial.ended(None)
    assert trial.result().loss == 3.0


@pytest.mark.slow
def test_hopeless_trial_stopped_early(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_checkout(tmp_path, after=100)
    monkeypatch.setattr(trials, "project_root", lambda: tmp_path)
    config = with_train(small, max_steps=200)
    (result,) = run_trials([config], limit=lambda config, step: 0.1)
    assert math.isinf(result.loss)
    assert 100 <= result.tokens / 128 < 200
    assert run_trial(config) == result, "it is not trained again"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_restart_continues_interrupted_trial(number: int, small: RunConfig, tmp_path: Path) -> None:
    config = with_train(small, max_steps=200)
    file, run = write_run_config(config, tmp_path / "config.json"), RunPaths.of("tiny")
    words, slow = [sys.executable, "-c", PROGRAM, str(file), str(tmp_path)], slow_checkout(tmp_path, after=50)
    process = subprocess.Popen(words)
    while recent_loss(run)[0] < 50:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.wait()
    assert process.returncode == {signal.SIGINT: -2, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    # After SIGKILL the run is left behind and trains on; the next start waits for it.
    assert is_locked(run.root / ".lock") == (number == signal.SIGKILL)
    slow.unlink()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) == eval_rows(run.root, "validation")[-1]["loss"]
    assert train_rows(run.root)[-1]["step"] == 200
    log = (run.root / "trial.log").read_text()
    assert log.count("steps 0 to 200") == 1
    assert ("resuming from" in log) == (number != signal.SIGKILL)
