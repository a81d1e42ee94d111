"""What a run costs, from its config alone: batch arithmetic, parameters, FLOPs, memory, disk. Allocates nothing."""

from dataclasses import dataclass

from .config import ModelConfig, OptimConfig, RunConfig, TrainConfig

WARMUP_FRACTION = 0.25
"""Of a run, the most that warm-up takes. Published runs use 0.1 to 10 %; a short trial of a long preset would otherwise
end before its learning rate has risen."""


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
    return [] if remainder else [size for size in range(1, share + 1) if share % size == 0]


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


def disk_estimate_bytes(config: RunConfig) -> dict[str, int]:
    """What the run's folder and its data set take, for what can be known before anything is read."""
    saves = -(-config.train.max_steps // (config.train.save_every_steps or config.train.max_steps))
    milestones = config.train.max_steps // config.train.keep_every_steps if config.train.keep_every_steps else 0
    kept = min((config.train.keep_last or saves) + milestones, max(saves, milestones))
    trained = config.train.max_steps * config.train.batch_tokens
    tokens = min(trained, config.data.target_tokens or trained) + config.data.val_tokens
    best = config.train.early_stop_patience is not None
    # One more than kept: the newest is whole before the oldest goes.
    return {"checkpoints": (kept + 1 + best) * checkpoint_bytes(config), "token shards, at most": 2 * tokens}
