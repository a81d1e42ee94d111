"""A run that is stopped from outside, with real processes and real signals."""

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import command, launch, losses, with_train, write_run_config

from myllm.checkpoint import list_checkpoints, load
from myllm.config import RunConfig


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command("--config", path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and f'"step": {step}, "tokens"' in (run / "metrics.jsonl").read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    pytest.fail(f"step {step} was never reached")


@pytest.fixture
def long(tiny: RunConfig, tmp_path: Path) -> RunConfig:
    """Long enough to be hit in the middle."""
    evals = replace(tiny.eval, cloze_every_steps=0, sample_every_steps=0, validation_every_steps=0)
    config = replace(with_train(tiny, max_steps=60, save_every_steps=10), eval=evals)
    write_run_config(config, tmp_path / "long.json")
    write_run_config(replace(config, name="whole"), tmp_path / "whole.json")
    return config


def test_a_run_that_is_interrupted_three_times(long: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """Ctrl-C, kill -9, and a scheduler's SIGTERM: the same command each time, and losses as if nothing had happened."""
    run = temp_data / "runs" / "tiny"
    for number, step in ((signal.SIGINT, 7), (signal.SIGKILL, 24), (signal.SIGTERM, 43)):
        process = start(tmp_path / "long.json")
        wait_for_step(process, run, step)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -9
            continue
        # Polite signals save where they are.
        assert process.returncode == 128 + number, said
        newest = load(list_checkpoints(run / "checkpoints")[0])
        assert newest.state.step == max(losses(run)) >= step
        assert f"stopped after step {newest.state.step}, saved" in said
        assert "Traceback" not in said
    assert launch("--config", tmp_path / "long.json").returncode == 0
    assert launch("--config", tmp_path / "whole.json").returncode == 0
    assert losses(run) == losses(temp_data / "runs" / "whole")
    assert (run / "log.txt").read_text().count("resuming from") == 3
    assert (run / "report.html").is_file()
    assert not [path for path in run.rglob("*") if path.name.startswith(".partial") or path.suffix == ".tmp"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "long.json") in (p.info["cmdline"] or [])]
