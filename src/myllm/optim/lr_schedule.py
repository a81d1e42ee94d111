"""The learning rate as a pure function of the step, so there is nothing to save or restore."""

import math

from myllm.config import OptimConfig
from myllm.planning.length import decay_steps, warmup_steps


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """AdamW's rate of update number `step`, counted from 0. Muon's is muon_lr times the same `rate_factor`."""
    return config.max_lr * rate_factor(step, config, max_steps)


def rate_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """The rate of update number `step`, counted from 0, as a fraction of the peak.

    Linear warm-up over `warmup_steps`, where the first update is above zero; then the decay of the schedule, which
    reaches min_lr_ratio at max_steps:

        cosine, linear    from the end of the warm-up on
        wsd               level, then down over the last `decay_steps` by the line, cosine or 1 - sqrt of decay_shape

    A long decay is better. With Muon at 300M parameters and 6B tokens, decays over 0.2 / 0.4 / 0.6 / 0.8 / 1.0 of the
    steps end at a loss of 3.271 / 3.240 / 3.229 / 3.224 / 3.225 (Marin, experiments/optimizer_sweep), hence the default
    of decay_fraction.

    Source: warm-up and cosine as in build-nanogpt's get_lr; wsd is warm-up, stable, decay (Hu et al. 2024, MiniCPM);
    1 - sqrt is from Hägele et al. 2024, arXiv 2405.18392.
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return (step + 1) / warmup
    decay = decay_steps(config, max_steps)
    if decay == 0:  # wsd without a decay
        return 1.0
    progress = min(max(1 - (max_steps - step) / decay, 0.0), 1.0)
    shape = config.decay_shape if config.schedule == "wsd" else config.schedule
    if shape == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif shape == "sqrt":
        left = 1 - math.sqrt(progress)
    else:
        left = 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left
