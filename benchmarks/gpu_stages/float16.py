"""float16 with a loss scale, as cards without bfloat16 train: gradients are right, and an overflow costs one update."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from myllm.checkpoint.state import SkipStats
from myllm.training.gradient_guard import GradientGuard

from .bench import NO_DROPOUT, Bench, fresh, worst_error
from .correct import ours, reference, tokens_and_targets
from .frame import Check, close, correct
from .steps import Steps, made_up, stage_folder

LAYERS = 2
SCALE = 2.0**16
GRADIENT_ERROR, LOSS_ERROR = 3e-2, 1e-3
TOO_LARGE = 2.0**24
"""A scale at which gradients overflow."""
STEPS = 24


def run(bench: Bench) -> Iterator[Check]:
    yield from gradients(bench)
    config = bench.config(LAYERS, micro_batch=2 if bench.tiny else 8, precision="float16", compile="off")
    with stage_folder(bench) as folder, ExitStack() as stack:
        steps = Steps(config, bench.process, made_up(bench, config, folder), stack)
        guard = GradientGuard(config.train, bench.device, SkipStats(loss_scale=TOO_LARGE))
        steps.trainer = replace(steps.trainer, guard=guard)
        losses = steps.losses(4 if bench.tiny else STEPS)
        skips = guard.sync()
    right = skips.overflows > 0 and skips.nonfinite == 0 and skips.loss_scale < TOO_LARGE
    measured = f"{skips.overflows} overflows, {skips.nonfinite} bad numbers, scale {skips.loss_scale:,.0f}"
    yield correct("a scale too large", right, measured, "overflows only, a smaller scale")
    worst = max(losses) if all(loss == loss for loss in losses) else float("nan")
    finite = worst < 1.05 * losses[0]
    yield correct("losses", finite, f"{losses[0]:.3f} to {losses[-1]:.3f}", "finite, and not rising")


def gradients(bench: Bench) -> Iterator[Check]:
    """Against float64, eager and compiled."""
    model = replace(bench.model(layers=LAYERS), **NO_DROPOUT, **({"vocab_size": 300} if bench.tiny else {}))
    batch, scale = tokens_and_targets(model, bench.device, 1), torch.tensor(SCALE, device=bench.device)
    expected_loss, expected = reference(model, batch, bench.device)
    for compiled in ("off", "on"):
        fresh(bench.device)
        loss, scaled = ours(bench, model, batch, "float16", compiled, scale)
        found: dict[str, Tensor] = {name: gradient / scale for name, gradient in scaled.items()}
        error, worst = worst_error(found, expected)
        way = "compiled" if compiled == "on" else "eager"
        yield close(f"{way}, loss", abs(loss - expected_loss) / expected_loss, LOSS_ERROR)
        yield close(f"{way}, gradients ({worst})", error, GRADIENT_ERROR)
