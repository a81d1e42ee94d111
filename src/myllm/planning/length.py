"""How long a run trains: epochs, steps, warm-up and decay."""

import math
from dataclasses import replace

from myllm.config import OptimConfig, RunConfig

from .own_text import USUAL_EPOCHS, fit_batch, fitting_options

WARMUP_FRACTION = 0.25
"""Warm-up takes at most this fraction of a run. Published runs use 0.1 to 10 %; without the limit, a short trial of a
long preset would end before its learning rate has risen."""

FEW_STEPS = 400
"""Of a run, and of one epoch: fewer learn less from the same text than a smaller batch does."""


def count_epochs(config: RunConfig, train_tokens: int) -> float:
    """Epochs of train.max_steps."""
    length = config.model.max_seq_len
    sequences = max(train_tokens - 1, 0) // length
    return config.train.max_steps * (config.train.batch_tokens // length) / max(sequences, 1)


def tokens_to_resolve_max_steps(config: RunConfig, own_text: bool) -> float:
    """Training tokens that `resolve_max_steps` needs to know of for its final answer. math.inf: all of the data set."""
    if config.train.epochs is not None:
        return math.inf
    if not own_text:
        return 0
    length = config.model.max_seq_len
    sequences = config.train.max_steps * (config.train.batch_tokens // length) / USUAL_EPOCHS
    return math.ceil(sequences) * length + 1


def resolve_max_steps(config: RunConfig, train_tokens: int, own_text: bool = False) -> RunConfig:
    """The config with train.epochs turned into train.max_steps.

    Args:
        own_text: the text is not the preset's, and the user set no length: limit train.max_steps to USUAL_EPOCHS.
    """
    train, steps_per_epoch = config.train, config.train.max_steps / max(count_epochs(config, train_tokens), 1e-9)
    if train.epochs is not None:
        train = replace(train, max_steps=max(round(train.epochs * steps_per_epoch), 1), epochs=None)
    elif own_text:
        train = replace(train, max_steps=max(min(train.max_steps, int(USUAL_EPOCHS * steps_per_epoch)), 1))
    return replace(config, train=train)


def describe_length(config: RunConfig, train_tokens: int, exact: bool = True) -> list[str]:
    """Tokens, steps and epochs of the run, then a sentence about whatever is unusual.

    Args:
        exact: train_tokens is counted, not estimated.
    """
    tokens, epochs = config.train.max_steps * config.train.batch_tokens, count_epochs(config, train_tokens)
    about = "" if exact else "about "
    lines = [
        f"{tokens:,} tokens in {config.train.max_steps:,} steps: {about}{epochs:,.2f} epochs of {about}"
        f"{train_tokens:,} training tokens"
    ]
    if epochs > 1.05 * USUAL_EPOCHS:
        usual = resolve_max_steps(replace(config, train=replace(config.train, epochs=USUAL_EPOCHS)), train_tokens)
        remedy = f"set --train.epochs {USUAL_EPOCHS:g} ({usual.train.max_steps:,} steps)"
        if usual.train.max_steps >= config.train.max_steps:  # a single step reads the text that often
            remedy = "lower train.batch_tokens"
        lines.append(
            f"warning: {epochs:,.1f} epochs are many: up to about {USUAL_EPOCHS:g}, repeated text is nearly as good as "
            f"new; far beyond that, the model memorizes it (arXiv 2305.16264); add text, or {remedy}"
        )
    few = config.train.max_steps < FEW_STEPS and train_tokens < FEW_STEPS * config.train.batch_tokens
    if few and (options := fitting_options(config, train_tokens)):
        steps, batch = config.train.max_steps, config.train.batch_tokens
        lines.append(
            f"warning: {steps:,} steps of {batch:,} tokens are few; this text suits {options} "
            f"({fit_batch(config, train_tokens).train.max_steps:,} steps)"
        )
    target = config.data.target_tokens
    # An estimate from file sizes can be off by a factor of two.
    if target and (train_tokens if exact else 2 * train_tokens) < 0.95 * target:
        lines.append(f"note: data.target_tokens {target:,} is more than the source has")
    return lines


def length_note(config: RunConfig, own_text: bool) -> str | None:
    """A sentence if the size of the text will decide the number of steps, else None."""
    if config.train.epochs is not None:
        return f"train.epochs {config.train.epochs:g} will set the number of steps once the size of the text is known"
    if own_text:
        return f"at most {USUAL_EPOCHS:g} epochs of the text, whose size is not known yet; --train.epochs changes that"
    return None


def warmup_steps(optim: OptimConfig, max_steps: int) -> int:
    """Updates of linear warm-up: optim.warmup_steps, limited to WARMUP_FRACTION of the run."""
    return min(optim.warmup_steps, int(WARMUP_FRACTION * max_steps))


def decay_steps(optim: OptimConfig, max_steps: int) -> float:
    """Steps over which the learning rate decays: all after the warm-up or, with wsd, the last decay_fraction."""
    after_warmup = max_steps - warmup_steps(optim, max_steps)
    return min(optim.decay_fraction * max_steps, after_warmup) if optim.schedule == "wsd" else after_warmup


def decay_start(optim: OptimConfig, max_steps: int) -> int:
    """Up to this number of updates, the learning rate has not decayed."""
    return math.floor(max_steps - decay_steps(optim, max_steps))


def momentum_warmup_steps(optim: OptimConfig, max_steps: int) -> int:
    """Updates over which Muon's momentum rises: optim.muon_momentum_warmup_steps, limited in the same way."""
    return min(optim.muon_momentum_warmup_steps, int(WARMUP_FRACTION * max_steps))


def warmup_note(config: RunConfig) -> str | None:
    """A sentence if warm-up is shorter than configured, else None."""
    used, max_steps = warmup_steps(config.optim, config.train.max_steps), config.train.max_steps
    if used == config.optim.warmup_steps:
        return None
    return (
        f"warm-up takes {used:,} steps instead of optim.warmup_steps {config.optim.warmup_steps:,}: at most a quarter "
        f"of train.max_steps {max_steps:,}"
    )


def decay_note(config: RunConfig) -> str | None:
    """A sentence about when wsd decays, and what to keep to lengthen the run later; None for other schedules."""
    train, start = config.train, decay_start(config.optim, config.train.max_steps)
    if config.optim.schedule != "wsd" or start >= train.max_steps:
        return None
    keeps_one = train.keep_last == 0 or 0 < train.keep_every_steps <= start
    keep = "" if keeps_one or not start else f" (--train.keep-every-steps {start} keeps one)"
    return (
        f"the learning rate decays from step {start:,} on; until then --train.max-steps lengthens the run, later only "
        f"from a checkpoint of that time{keep}"
    )
