"""How long a run is: epochs, steps and warm-up."""

import math
from dataclasses import replace

from myllm.config import OptimConfig, RunConfig

WARMUP_FRACTION = 0.25
"""Of a run, the most that warm-up takes. Published runs use 0.1 to 10 %; a short trial of a long preset would otherwise
end before its learning rate has risen."""


USUAL_EPOCHS = 4.0
"""So many passes over the same text teach nearly as much as new text would; many more teach little, and the validation
loss rises. Source: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264."""


FEW_STEPS = 100


def count_epochs(config: RunConfig, train_tokens: int) -> float:
    """Passes over so much text that the run makes."""
    length = config.model.max_seq_len
    sequences = max(train_tokens - 1, 0) // length
    return config.train.max_steps * (config.train.batch_tokens // length) / max(sequences, 1)


def tokens_to_resolve_max_steps(config: RunConfig, own_text: bool) -> float:
    """Training tokens that must exist before `resolve_max_steps` gives its final answer; math.inf: the complete data
    set."""
    if config.train.epochs is not None:
        return math.inf
    if not own_text:
        return 0
    length = config.model.max_seq_len
    sequences = config.train.max_steps * (config.train.batch_tokens // length) / USUAL_EPOCHS
    return math.ceil(sequences) * length + 1


def resolve_max_steps(config: RunConfig, train_tokens: int, own_text: bool = False) -> RunConfig:
    """The config with train.epochs as train.max_steps of so much text.

    Args:
        own_text: the text is not the preset's and nobody said how long to train on it: train.max_steps, but no more
            than USUAL_EPOCHS.
    """
    train, per_epoch = config.train, config.train.max_steps / max(count_epochs(config, train_tokens), 1e-9)
    if train.epochs is not None:
        train = replace(train, max_steps=max(round(train.epochs * per_epoch), 1), epochs=None)
    elif own_text:
        train = replace(train, max_steps=max(min(train.max_steps, int(USUAL_EPOCHS * per_epoch)), 1))
    return replace(config, train=train)


def describe_length(config: RunConfig, train_tokens: int, counted: bool = True) -> list[str]:
    """How long the run is beside the text that it has, and what is unusual about that, a sentence each.

    Args:
        counted: or only estimated.
    """
    tokens, epochs = config.train.max_steps * config.train.batch_tokens, count_epochs(config, train_tokens)
    about = "" if counted else "about "
    lines = [
        f"{tokens:,} tokens to train on in {config.train.max_steps:,} steps: {about}{epochs:,.2f} epoch(s) of the "
        f"{about}{train_tokens:,} tokens"
    ]
    usual = resolve_max_steps(replace(config, train=replace(config.train, epochs=USUAL_EPOCHS)), train_tokens)
    if epochs > 1.05 * USUAL_EPOCHS:
        fewer = f"give --train.epochs {USUAL_EPOCHS:g} ({usual.train.max_steps:,} steps)"
        if usual.train.max_steps >= config.train.max_steps:  # one step alone reads the text that often
            fewer = "lower train.batch_tokens"
        lines.append(
            f"warning: {epochs:,.1f} epochs are many: up to about {USUAL_EPOCHS:g}, repeated text is nearly as good as "
            f"new, far beyond that the model learns it by heart (arXiv 2305.16264); add text, or {fewer}"
        )
    if config.train.max_steps < FEW_STEPS and train_tokens < FEW_STEPS * config.train.batch_tokens:
        lines.append(
            f"warning: {config.train.max_steps:,} steps are few: a smaller train.batch_tokens than "
            f"{config.train.batch_tokens:,} makes more of the same text, and --train.epochs N sets how often it is seen"
        )
    wanted = config.data.target_tokens
    # A guess from the sizes of files is only believed where it is far off.
    if wanted and (train_tokens if counted else 2 * train_tokens) < 0.95 * wanted:
        lines.append(f"note: data.target_tokens {wanted:,} is more than there is")
    return lines


def length_note(config: RunConfig, own_text: bool) -> str | None:
    """One sentence where the text's size will decide how long the run is, or None."""
    if config.train.epochs is not None:
        return f"train.epochs {config.train.epochs:g} decides the steps once the text's size is known, and not these"
    if own_text:
        return f"at most {USUAL_EPOCHS:g} epochs of the text, whose size is not known yet; --train.epochs N for others"
    return None


def warmup_steps(optim: OptimConfig, max_steps: int) -> int:
    """Updates of linear warm-up: optim.warmup_steps, capped at a quarter of the run."""
    return min(optim.warmup_steps, int(WARMUP_FRACTION * max_steps))


def warmup_note(config: RunConfig) -> str | None:
    """One sentence if warm-up is shorter than configured, or None."""
    used, max_steps = warmup_steps(config.optim, config.train.max_steps), config.train.max_steps
    if used == config.optim.warmup_steps:
        return None
    return (
        f"warm-up takes {used:,} steps instead of optim.warmup_steps {config.optim.warmup_steps:,}: at most a quarter "
        f"of train.max_steps {max_steps:,}"
    )
