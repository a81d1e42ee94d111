"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from myllm.config import OptimConfig
from myllm.planning.length import warmup_steps


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """The rate of update number `step`, counted from 0.

    Linear warm-up to max_lr over `plan.warmup_steps`, its first update already above zero; then the schedule's decay,
    which reaches min_lr_ratio * max_lr at max_steps.

    Source: warm-up and cosine as in build-nanogpt's get_lr; wsd is warm-up, stable, decay (Hu et al. 2024, MiniCPM).
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return config.max_lr * (step + 1) / warmup
    left = max_steps - warmup
    progress = min((step - warmup) / left, 1.0)
    if config.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        share = 1 - progress
    else:
        decay_steps = min(config.decay_fraction * max_steps, left)
        share = min(max(max_steps - step, 0) / decay_steps, 1.0) if decay_steps > 0 else 1.0
    return config.max_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
