"""--profile: the trace, the table, and a run that does not notice."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import losses, with_train
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval, Kernel

from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.training.loop import train
from myllm.training.profiler import (
    PHASES,
    STEPS,
    WARMUP_STEPS,
    Cost,
    choose_window,
    format_costs,
    gpu_busy_us,
    kernel_costs,
)

pytestmark = pytest.mark.usefixtures("prepared_data")


def event(name: str, start: float, end: float, self_us: float = 0.0, **changes: Any) -> SimpleNamespace:
    """What torch.profiler has of an operator on the host."""
    about = {"device_type": DeviceType.CPU, "is_user_annotation": False, "kernels": []} | changes
    return SimpleNamespace(name=name, time_range=Interval(start, end), self_cpu_time_total=self_us, **about)


def mark(name: str, start: float, end: float) -> SimpleNamespace:
    return event(name, start, end, is_user_annotation=True)


def on_gpu(name: str, start: float, end: float, **changes: Any) -> SimpleNamespace:
    return event(name, start, end, device_type=DeviceType.CUDA, **changes)


def test_kernel_cost_belongs_to_launching_phase() -> None:
    """On a GPU it runs long after that; copies count too, and overlapping ones are busy time once."""
    matmul, copy, fused = Kernel("matmul", 0, 50), Kernel("copy", 0, 5), Kernel("triton_fused", 0, 30)
    events = [
        mark("step", 0, 30),
        mark("forward", 0, 10),
        mark("backward", 10, 20),
        event("aten::mm", 1, 6, kernels=[matmul, matmul]),
        event("aten::mm", 12, 13, kernels=[Kernel("matmul", 0, 70)]),
        event("triton_fused", 13, 14, kernels=[fused]),
        event("aten::copy_", 25, 26, kernels=[copy]),
        event("aten::mm", 35, 36, kernels=[Kernel("of an evaluation", 0, 500)]),
        on_gpu("forward", 100, 220, is_user_annotation=True),
        on_gpu("matmul", 100, 150),
        on_gpu("matmul", 150, 220),
        on_gpu("triton_fused", 210, 240),
        on_gpu("copy", 300, 305),
    ]
    assert kernel_costs(events) == [
        Cost("matmul", "forward", 2, 100),
        Cost("matmul", "backward", 1, 70),
        Cost("triton_fused", "backward", 1, 30),
        Cost("copy", "other", 1, 5),
    ]
    assert gpu_busy_us(events) == 50 + 90 + 5


def test_cpu_operator_cost_is_self_time() -> None:
    events = [
        mark("step", 0, 150),
        mark("forward", 0, 100),
        event("aten::linear", 10, 60, self_us=10),
        event("aten::addmm", 15, 55, self_us=40),
        event("aten::add", 70, 75, self_us=5),
        event("aten::add", 70, 75, self_us=5),  # on another thread
        mark("optimizer", 100, 150),
        event("aten::add", 110, 118, self_us=8),
        event("aten::add", 160, 230, self_us=70),
    ]
    assert kernel_costs(events) == [
        Cost("aten::addmm", "forward", 1, 40),
        Cost("aten::linear", "forward", 1, 10),
        Cost("aten::add", "forward", 2, 10),
        Cost("aten::add", "optimizer", 1, 8),
    ]
    assert gpu_busy_us(events) == 0


def test_format_empty_costs() -> None:
    assert "0.0%" in format_costs([], 0.0, range(3, 4), 1.0)


@pytest.mark.parametrize("begun", [0, 100, 585, 597, 599])
def test_window_avoids_logging_saving_and_evaluation(tiny: RunConfig, begun: int) -> None:
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


def test_window_exists_despite_frequent_logging(tiny: RunConfig) -> None:
    config = with_train(tiny, max_steps=40, log_every_steps=1)
    assert choose_window(config, 0) == range(12, 17)  # validation at 6, 12, 18; saves at 4, 8, 12, 16


def test_profiling_does_not_change_losses(tiny: RunConfig) -> None:
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
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
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
