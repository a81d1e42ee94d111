"""What a run says about its time: rows, lines, and the report's table."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import train_rows, with_train
from training.test_loop import run, run_until

from myllm.checkpoint.async_saver import AsyncSaver
from myllm.config import RunConfig
from myllm.data.dataloader import BatchLoader
from myllm.distributed.collectives import DistContext
from myllm.paths import RunPaths
from myllm.runs.history import read_metrics
from myllm.training import loop
from myllm.training.setup import RunContext
from myllm.training.throughput import ThroughputMeter, console_line, progress_text, time_line

pytestmark = pytest.mark.usefixtures("prepared_data")


def overhead_rows(root: Path) -> list[dict]:
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "overhead"]


class Clock:
    """Time advances only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr("myllm.runs.logs.time.perf_counter", lambda: self.now)

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def slowed(*args: object, **kwargs: object) -> object:
            self.now += seconds
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, slowed)


def test_tokens_per_second_excludes_overhead(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation, samples and saves are made to take hours; steps take 2 s each, of which 0.5 s wait for data."""
    clock = Clock(monkeypatch)
    clock.slow(monkeypatch, loop, "train_step", 1.5)
    clock.slow(monkeypatch, loop, "run_eval", 3_600)
    clock.slow(monkeypatch, AsyncSaver, "save", 1_800)
    real = BatchLoader.next_batch

    def late(self: BatchLoader) -> object:
        batch = real(self)
        self.wait_s += 0.25
        clock.now += 0.25
        return batch

    monkeypatch.setattr(BatchLoader, "next_batch", late)
    root = run(with_train(tiny, log_every_steps=3))
    rows = train_rows(root)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    for row in rows:  # two micro-steps of 64 tokens
        assert row["step_s"] == pytest.approx(2.0)
        assert row["tokens_per_s"] == pytest.approx(64.0)
        assert row["data_wait_s"] == pytest.approx(0.5, abs=0.2), "of each step; what the loader really took is in it"
    seconds = [row["seconds"] for row in overhead_rows(root)]
    assert seconds[0] == pytest.approx(
        {"starting": seconds[0]["starting"], "validation": 3_600, "cloze": 3_600, "samples": 3_600}
    )
    assert seconds[0]["starting"] > 0
    assert seconds[1:] == [{"saving": 1_800}, {"saving": 1_800, "validation": 3_600}, pytest.approx(
        {"saving": 1_800, "validation": 3_600, "cloze": 3_600, "samples": 3_600}
    )]  # fmt: skip
    assert [row["step"] for row in overhead_rows(root)] == [3, 6, 9, 12]
    (line,) = [line for line in (root / "log.txt").read_text().splitlines() if "  time: " in line]
    assert "validation 35.3%" in line
    assert "training 0.1%" in line


def test_restart_preserves_overhead_times(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of repeated steps are removed with their time; the time of every start is kept."""
    broken = with_train(replace(tiny, name="broken"), log_every_steps=2)
    run_until(broken, 6, monkeypatch)
    run_until(broken, 11, monkeypatch)
    root = run(broken)
    rows = overhead_rows(root)
    assert [row["step"] for row in rows if "starting" in row["seconds"]] == [2, 6, 10]
    metrics = read_metrics(root / "metrics.jsonl")
    assert metrics.skipped == 0
    assert metrics.overhead["starting"] == pytest.approx(sum(row["seconds"].get("starting", 0) for row in rows))
    seconds = metrics.time_by_activity()
    assert {"training", "starting", "validation", "cloze", "samples", "saving"} <= seconds.keys()
    training = sum(2 * row["step_s"] for row in train_rows(root))
    assert seconds["training"] + seconds.get("waiting for data", 0) == pytest.approx(training)


def test_console_and_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    row = {"step": 5, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0, "step_s": 0.25, "tokens_per_s": 4_000.0, "mfu": None}
    assert "wait" not in console_line(row | {"data_wait_s": 0.001}, 10)
    assert "data wait 20%" in console_line(row | {"data_wait_s": 0.05}, 10)
    assert "lr 1.00e-03  norm" in console_line(row | {"data_wait_s": 0}, 10)
    assert "lr 1.00e-03  muon 2.00e-02  norm" in console_line(row | {"data_wait_s": 0, "muon_lr": 0.02}, 10)
    monkeypatch.setenv("COLUMNS", "80")
    assert progress_text(row, 10) == "loss 3.000, eta 0:00:01, 4k tok/s, lr 1.0e-03"
    large = {"step": 119_000, "loss": 10.9543, "lr": 6e-4, "muon_lr": 0.01, "grad_norm": 123.45, "step_s": 12.345}
    large |= {"tokens_per_s": 12_345_678, "mfu": 0.456, "data_wait_s": 6.0}
    monkeypatch.setenv("COLUMNS", "200")
    assert console_line(large, 119_073) == (
        "step 119,000/119,073  loss 10.9543  lr 6.00e-04  12.3M tok/s  mfu 45.6%  data wait 49%  eta 0:15:01"
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert console_line(large, 119_073) == "step 119,000/119,073  loss 10.9543  lr 6.00e-04  12.3M tok/s  eta 0:15:01"
    for columns, expected in {
        40: "loss 10.954",
        80: "loss 10.954, eta 0:15:01, 12.3M tok/s",
        120: "loss 10.954, eta 0:15:01, 12.3M tok/s, mfu 45.6%, lr 6.0e-04",
    }.items():
        monkeypatch.setenv("COLUMNS", str(columns))
        assert progress_text(large, 119_073) == expected
    line = time_line({"starting": 7, "training": 920, "validation": 60, "saving": 13, "evaluating": 0.1}, 1.0)
    assert line == (
        "time: 0:16:40 since the start: training 92.0%, validation 6.0%, saving 1.3%, starting 0.7%; "
        "waiting for the loader 0.1%"
    )


def test_stop_before_first_step_writes_no_metrics(tiny: RunConfig, tmp_path: Path) -> None:
    """A report cannot be drawn from a file without a step."""
    lines: list[str] = []
    alone = DistContext(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    ctx = RunContext.create(tiny, alone, RunPaths(tmp_path), lines.append)
    meter = ThroughputMeter(ctx, SimpleNamespace(wait_s=0.0, digest_sums=np.zeros(1)), step=0)
    with meter.timed("starting"):
        pass
    meter.finish(0)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert lines[0].startswith("time: 0:00:00")
