"""--profile: the trace, the table, and a run that does not notice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import losses, with_train

from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.training.kernel_costs import PHASES, Cost, read, table
from myllm.training.loop import train
from myllm.training.profiler import STEPS, WARMUP_STEPS, choose_window


def call(correlation: int, ts: float, category: str = "cuda_runtime") -> dict:
    return event("cudaLaunchKernel", category, ts, 1, correlation)


def event(name: str, category: str, ts: float, dur: float, correlation: int | None = None, tid: int = 1) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "name": name, "cat": category, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def test_a_kernel_counts_to_the_phase_that_started_it() -> None:
    """On a GPU it runs long after that; copies count too, and overlapping ones are busy time once."""
    events = [
        event("step", "user_annotation", 0, 30),
        event("forward", "user_annotation", 0, 10),
        event("backward", "user_annotation", 10, 10),
        event("aten::mm", "cpu_op", 1, 5),
        call(1, 2),
        call(2, 12),
        call(3, 13, "cuda_driver"),
        call(4, 25),
        call(5, 35),
        event("matmul", "kernel", 100, 50, 1, tid=7),
        event("matmul", "kernel", 150, 70, 2, tid=7),
        event("triton_fused", "kernel", 210, 30, 3, tid=8),
        event("copy", "gpu_memcpy", 300, 5, 4, tid=9),
        event("of an evaluation", "kernel", 400, 500, 5, tid=7),
        {"ph": "M", "name": "process_name", "pid": 1},
    ]
    found = read({"traceEvents": events})
    assert found.on_device
    assert found.costs == [
        Cost("matmul", "backward", 1, 70),
        Cost("matmul", "forward", 1, 50),
        Cost("triton_fused", "backward", 1, 30),
        Cost("copy", "other", 1, 5),
    ]
    assert found.busy_us == 50 + 90 + 5


def test_an_operation_of_a_cpu_has_the_time_that_is_its_own() -> None:
    events = [
        event("step", "user_annotation", 0, 150),
        event("forward", "user_annotation", 0, 100),
        event("aten::linear", "cpu_op", 10, 50),
        event("aten::addmm", "cpu_op", 15, 40),
        event("aten::copy_", "cpu_op", 20, 4),
        event("aten::add", "cpu_op", 70, 5),
        event("aten::add", "cpu_op", 70, 5, tid=2),  # another thread's is inside nothing here
        event("optimizer", "user_annotation", 100, 50),
        event("aten::add", "cpu_op", 110, 8),
        event("aten::add", "cpu_op", 160, 70),
    ]
    found = read({"traceEvents": events})
    assert not found.on_device
    assert found.costs == [
        Cost("aten::addmm", "forward", 1, 36),
        Cost("aten::linear", "forward", 1, 10),
        Cost("aten::add", "forward", 2, 10),
        Cost("aten::add", "optimizer", 1, 8),
        Cost("aten::copy_", "forward", 1, 4),
    ]
    assert found.busy_us == 50 + 5 + 8


def test_nothing_recorded_is_a_table_too(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    file.write_text('{"traceEvents": []}')
    assert "0.0%" in table(file, range(3, 4), 1.0)


@pytest.mark.parametrize("begun", [0, 100, 585, 597, 599])
def test_the_window_lies_between_what_disturbs(tiny: RunConfig, begun: int) -> None:
    config = with_train(tiny, max_steps=600, log_every_steps=10, save_every_steps=150)
    evals = {"validation_every_steps": 12, "cloze_every_steps": 300, "sample_every_steps": 0}
    config = replace(config, eval=replace(tiny.eval, **evals))
    window = choose_window(config, begun)
    assert window.start >= begun
    assert window.stop <= 600
    assert len(window) == min(STEPS, 600 - begun)
    if begun < 580:
        assert window.start >= begun + WARMUP_STEPS
        for boundary in window[1:]:
            assert all(boundary % cadence for cadence in (10, 150, 12, 300))


def test_a_window_is_found_where_everything_disturbs(tiny: RunConfig) -> None:
    config = with_train(tiny, max_steps=40, log_every_steps=1)
    assert choose_window(config, 0) == range(12, 17)  # validation at 6, 12, 18; saves at 4, 8, 12, 16


def test_a_profiled_run_is_the_same_run(tiny: RunConfig) -> None:
    """The trace opens, with every phase of every step; ten rows; the losses are those of a run without, bit by bit."""
    config = with_train(tiny, max_steps=8, batch_tokens=256, micro_batch_size=2)
    runs = []
    for profile in (False, True):
        named = replace(config, name=f"profile-{profile}")
        with process_group("cpu") as process:
            runs.append(train(named, prepare(config.data, progress=False), process, profile=profile).run.root)
    plain, profiled = runs
    assert losses(profiled) == losses(plain)
    assert sorted(losses(profiled)) == list(range(1, 9))
    assert not (plain / "profile").exists()
    assert "profile" not in json.loads((profiled / "config.json").read_text())["train"]

    trace = json.loads((profiled / "profile/trace.json").read_text())
    names = [each["name"] for each in trace["traceEvents"] if each.get("cat") == "user_annotation"]
    micro_steps = 2
    expected = {"data": micro_steps, "forward": micro_steps, "backward": micro_steps, "clip": 1, "optimizer": 1}
    assert {phase: names.count(phase) for phase in PHASES} == {phase: STEPS * n for phase, n in expected.items()}

    text = (profiled / "profile/kernels.txt").read_text()
    rows = re.findall(r"^(\w+) +([\d.]+)% +[\d.]+ +[\d,.]+   (.+)$", text.partition("costliest")[2], re.MULTILINE)
    assert len(rows) == 10
    shares = [float(share) for _, share, _ in rows]
    assert shares == sorted(shares, reverse=True)
    assert {phase for phase, *_ in rows} <= {*PHASES, "other"}
    assert any(phase == "forward" and "mm" in name for phase, _, name in rows)  # with the loss's gradient
    log = (profiled / "log.txt").read_text()
    assert str(profiled / "profile/kernels.txt") in log
    assert "step      8/8" in log
