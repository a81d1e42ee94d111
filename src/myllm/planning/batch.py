"""What a run costs, from its config alone: batch arithmetic, parameters, FLOPs, memory, disk. Allocates nothing."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from myllm.config import ModelConfig, OptimConfig, RunConfig, TrainConfig

WARMUP_FRACTION = 0.25
"""Of a run, the most that warm-up takes. Published runs use 0.1 to 10 %; a short trial of a long preset would otherwise
end before its learning rate has risen."""

USUAL_EPOCHS = 4.0
"""So many passes over the same text teach nearly as much as new text would; many more teach little, and the validation
loss rises. Source: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264."""
FEW_STEPS = 100


@dataclass(frozen=True)
class BatchPlan:
    """How batch_tokens is cut over ranks and micro-steps. Exact: the parts multiply to the whole."""

    batch_tokens: int
    seq_len: int
    micro_batch_size: int
    world_size: int

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-step over all ranks."""
        return self.micro_batch_size * self.seq_len * self.world_size

    @property
    def grad_accum_steps(self) -> int:
        return self.batch_tokens // self.micro_tokens

    @property
    def sequences(self) -> int:
        """Sequences a step over all ranks."""
        return self.batch_tokens // self.seq_len

    def fault(self) -> str | None:
        """Why the parts do not multiply to the whole, with the nearest values that do; None if they do."""
        if self.batch_tokens > 0 and self.micro_tokens > 0 and self.batch_tokens % self.micro_tokens == 0:
            return None
        below = self.batch_tokens // self.micro_tokens * self.micro_tokens
        tokens = [n for n in (below, below + self.micro_tokens) if n > 0]
        share, remainder = divmod(self.batch_tokens, self.seq_len * self.world_size)
        micro = [] if remainder else [n for n in range(1, min(share, 4_096) + 1) if share % n == 0]
        micro = sorted(sorted(micro, key=lambda n: abs(n - self.micro_batch_size))[:3])
        advice = f"set train.batch_tokens to {' or '.join(f'{n:,}' for n in tokens)}"
        if micro:
            advice += f", or train.micro_batch_size to {' or '.join(map(str, micro))}"
        return (
            f"train.batch_tokens {self.batch_tokens:,} is not a multiple of one micro-step: train.micro_batch_size "
            f"{self.micro_batch_size} x model.max_seq_len {self.seq_len:,} x {self.world_size} rank(s) = "
            f"{self.micro_tokens:,}; {advice}"
        )

    def __str__(self) -> str:
        return (
            f"{self.micro_batch_size} sequences x {self.seq_len:,} tokens x {self.world_size} rank(s) x "
            f"{self.grad_accum_steps} accumulation step(s) = {self.batch_tokens:,} tokens a step"
        )


def batch_plan(model: ModelConfig, train: TrainConfig, world_size: int) -> BatchPlan:
    # Until "auto" is a number, one sequence stands for it: it multiplies to the whole wherever any number does.
    micro_batch_size = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    return BatchPlan(train.batch_tokens, model.max_seq_len, micro_batch_size, world_size)


def micro_batch_sizes(model: ModelConfig, train: TrainConfig, world_size: int) -> list[int]:
    """Every micro-batch size that keeps batch_tokens exact on so many ranks, ascending; none if there is none."""
    share, remainder = divmod(train.batch_tokens, model.max_seq_len * world_size)
    if remainder:
        return []
    below = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    return sorted({*below, *(share // size for size in below)})


def epochs_of(config: RunConfig, train_tokens: int) -> float:
    """Passes over so much text that the run makes."""
    length = config.model.max_seq_len
    sequences = max(train_tokens - 1, 0) // length
    return config.train.max_steps * (config.train.batch_tokens // length) / max(sequences, 1)


def has_known_length(config: RunConfig, train_tokens: int, complete: bool, own_text: bool) -> bool:
    """Whether `with_length` can be told from the text that is there: all of it, or more than the run needs.

    Args:
        own_text: as for `with_length`.
    """
    if complete or (config.train.epochs is None and not own_text):
        return True
    return config.train.epochs is None and epochs_of(config, train_tokens) <= USUAL_EPOCHS


def with_length(config: RunConfig, train_tokens: int, own_text: bool = False) -> RunConfig:
    """The config with train.epochs as train.max_steps of so much text.

    Args:
        own_text: the text is not the preset's and nobody said how long to train on it: train.max_steps, but no more
            than USUAL_EPOCHS.
    """
    train, per_epoch = config.train, config.train.max_steps / max(epochs_of(config, train_tokens), 1e-9)
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
    tokens, epochs = config.train.max_steps * config.train.batch_tokens, epochs_of(config, train_tokens)
    about = "" if counted else "about "
    lines = [
        f"{tokens:,} tokens to train on in {config.train.max_steps:,} steps: {about}{epochs:,.2f} epoch(s) of the "
        f"{about}{train_tokens:,} tokens"
    ]
    usual = with_length(replace(config, train=replace(config.train, epochs=USUAL_EPOCHS)), train_tokens)
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


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameters by part, before the vocabulary is padded. A tied head counts once, as the embedding."""
    d, size, layers = model.d_model, model.head_size, model.n_layers
    bias = int(model.bias)
    heads = model.n_heads * size  # width of the queries
    qkv = heads + 2 * model.kv_heads * size
    up = model.d_ff * (2 if model.activation == "swiglu" else 1)
    norm = d * (1 + bias) if model.norm == "layernorm" else d
    return {
        "embedding": model.vocab_size * d,
        "positions": model.max_seq_len * d if model.position == "learned" else 0,
        "attention": layers * (d * qkv + bias * qkv + heads * d + bias * d + (2 * size if model.qk_norm else 0)),
        "feed-forward": layers * (d * up + bias * up + model.d_ff * d + bias * d),
        "norms": layers * 2 * norm + norm,
        "head": 0 if model.tie_embeddings else model.vocab_size * d,
    }


def n_parameters(model: ModelConfig) -> int:
    return sum(parameters_by_part(model).values())


def stored_parameters(model: ModelConfig) -> int:
    """As n_parameters, with the rows that pad the vocabulary."""
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model
    return n_parameters(model) + padding * (1 if model.tie_embeddings else 2)


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights and AdamW's two moments in float32."""
    return 12 * stored_parameters(config.model)


def n_saves(train: TrainConfig, first: int, last: int) -> int:
    """How many checkpoints are made after step `first`, up to `last`: at multiples of save_every_steps and of
    keep_every_steps, and at the run's end. By arithmetic, however long the run is."""
    cadences = [every for every in (train.save_every_steps, train.keep_every_steps) if every > 0]

    def multiples(of: int) -> int:
        return last // of - first // of

    count = sum(map(multiples, cadences)) - (multiples(math.lcm(*cadences)) if len(cadences) == 2 else 0)
    at_end = first < train.max_steps <= last and not any(train.max_steps % every == 0 for every in cadences)
    return max(count, 0) + at_end


def n_kept(train: TrainConfig, here: Sequence[int] = (), step: int = 0) -> int:
    """How many checkpoints there are when a run has ended: keep_last of the newest (0: all), and those at multiples of
    keep_every_steps.

    Args:
        here: the steps of those that are there already, in order.
        step: where the run goes on.
    """
    end, ahead = train.max_steps, n_saves(train, step, train.max_steps)
    if not train.keep_last or train.keep_last >= len(here) + ahead:
        return len(here) + ahead
    milestone = train.keep_every_steps
    if train.keep_last >= ahead:
        older = here[: len(here) - (train.keep_last - ahead)]
        milestones_ahead = 0
    else:  # the step before the newest keep_last, by bisection: each step further back can only add saves
        older = here
        newest = bisect.bisect_left(
            range(end - step), train.keep_last, key=lambda back: n_saves(train, end - back, end)
        )
        milestones_ahead = (end - newest) // milestone - step // milestone if milestone else 0
    return train.keep_last + milestones_ahead + sum(milestone > 0 and at % milestone == 0 for at in older)


def disk_estimate_bytes(config: RunConfig) -> dict[str, int]:
    """What the run's folder and its data set take, for what can be known before anything is read."""
    kept = n_kept(config.train)
    trained = config.train.max_steps * config.train.batch_tokens
    tokens = min(trained, config.data.target_tokens or trained) + config.data.val_tokens
    best = config.train.early_stop_patience is not None
    # One more than kept: the newest is whole before the oldest goes.
    return {"checkpoints": (kept + 1 + best) * checkpoint_bytes(config), "token shards, at most": 2 * tokens}
