"""Muon on this card: its update against float64, a nonfinite update, waiting for the device, and what it costs."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from myllm.config import OptimConfig, RunConfig
from myllm.model.transformer import Transformer
from myllm.optim.muon import iteration_dtype, orthogonalize
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.presets import get_preset

from .bench import PRESET, Bench, relative_error, seconds_of
from .frame import Check, bounded, close
from .guard import LAYERS, skips, waits
from .steps import Steps, made_up, stage_folder

MODERN = "lf-llm-269m-modern"
ERROR = 5e-2
"""Relative error of an update that bfloat16 explains; on a CPU it is 1 to 2 %."""
MOST_PERCENT = 1.5
"""Of a step's time, that Muon may take longer than AdamW."""


def run(bench: Bench) -> Iterator[Check]:
    yield update(bench)
    config = bench.config(LAYERS, micro_batch=2 if bench.tiny else 8, compile="off", on_nonfinite="skip")
    with stage_folder(bench) as folder, ExitStack() as stack:
        config = with_muon(config)
        steps = Steps(config, bench.process, made_up(bench, config, folder), stack)
        steps.losses(2)
        yield from skips(steps)
        yield waits(bench, steps)
    yield overhead(bench)


def with_muon(config: RunConfig) -> RunConfig:
    return replace(config, optim=get_preset(MODERN).optim)


def update(bench: Bench) -> Check:
    """The largest shape of the model, a batch of two."""
    model, generator = bench.model(), torch.Generator().manual_seed(0)
    matrices = torch.randn(2, model.d_model, model.d_ff, generator=generator)
    found = orthogonalize(matrices.to(bench.device), iteration_dtype(bench.device))
    return close("update against float64", relative_error(found, expected_update(matrices.to(bench.device))), ERROR)


def expected_update(matrices: Tensor) -> Tensor:
    return orthogonalize(matrices.double(), torch.float64)


def overhead(bench: Bench) -> Check:
    """Of a whole step of the preset, by which an update with Muon is slower than one with AdamW."""
    preset = get_preset(MODERN)
    model = Transformer(bench.model(MODERN)).to(bench.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    seconds = {name: update_seconds(bench, model, replace(preset.optim, optimizer=name)) for name in ("adamw", "muon")}
    measured = bench.config()
    step_s = bench.found.get("step_s", 0.0) * preset.train.batch_tokens / measured.train.batch_tokens
    extra = seconds["muon"] - seconds["adamw"]
    if bench.tiny or not step_s:
        return bounded("Muon's extra time per update", 1e3 * extra, None, None, "ms", **seconds)
    return bounded(
        f"Muon's extra time, of a step of {PRESET}", 100 * extra / step_s, None, MOST_PERCENT, "%", 2, **seconds
    )


def update_seconds(bench: Bench, model: Transformer, optim: OptimConfig) -> float:
    optimizer = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), optim, max_steps=1_000)
    skip = torch.zeros((), device=bench.device)
    return seconds_of(bench.device, lambda: optimizer.step(0, skip), repeats=3 if bench.tiny else 10)
