"""The learning rate as a pure function of the step, so there is nothing to save or restore."""

import math

from myllm.config import OptimConfig
from myllm.planning.length import warmup_steps


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """The rate of update number `step`, counted from 0.

    Linear warm-up to max_lr over `warmup_steps`, where the first update is above zero; then the decay of the schedule,
    which reaches min_lr_ratio * max_lr at max_steps.

    Source: warm-up and cosine as in build-nanogpt's get_lr; wsd is warm-up, stable, decay (Hu et al. 2024, MiniCPM).
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return config.max_lr * (step + 1) / warmup
    remaining = max_steps - warmup
    progress = min((step - warmup) / remaining, 1.0)
    if config.schedule == "cosine":
        fraction = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        fraction = 1 - progress
    else:
        decay_steps = min(config.decay_fraction * max_steps, remaining)
        fraction = min(max(max_steps - step, 0) / decay_steps, 1.0) if decay_steps > 0 else 1.0
    return config.max_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fraction)
