"""Batch arithmetic: batch_tokens = micro-batch x sequence length x ranks x accumulation steps, exactly."""

import math
from dataclasses import dataclass, replace

from myllm.config import RunConfig


@dataclass(frozen=True)
class BatchPlan:
    """How one step's batch is divided over ranks and micro-steps."""

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
        """Sequences per step over all ranks."""
        return self.batch_tokens // self.seq_len

    def with_max_accum_steps(self, steps: int) -> "BatchPlan":
        """The same micro-steps, but at most this many of them."""
        return replace(self, batch_tokens=min(self.grad_accum_steps, steps) * self.micro_tokens)

    def micro_batch_sizes(self) -> list[int]:
        """Every micro-batch size that divides batch_tokens exactly, ascending. Empty: no size does."""
        per_rank, remainder = divmod(self.batch_tokens, self.seq_len * self.world_size)
        if remainder:
            return []
        small = [size for size in range(1, math.isqrt(per_rank) + 1) if per_rank % size == 0]
        return sorted({*small, *(per_rank // size for size in small)})

    def error(self) -> str | None:
        """Why batch_tokens does not divide evenly, with the nearest values that do; None if it does."""
        if self.batch_tokens % self.micro_tokens == 0:
            return None
        below = self.batch_tokens // self.micro_tokens * self.micro_tokens
        batches = [f"{tokens:,}" for tokens in (below, below + self.micro_tokens) if tokens]
        advice = f"set train.batch_tokens to {' or '.join(batches)}"
        nearest = sorted(self.micro_batch_sizes(), key=lambda size: abs(size - self.micro_batch_size))[:3]
        if nearest:
            advice += f", or train.micro_batch_size to {' or '.join(map(str, sorted(nearest)))}"
        return (
            f"train.batch_tokens {self.batch_tokens:,} is not a multiple of one micro-step: train.micro_batch_size "
            f"{self.micro_batch_size} x model.max_seq_len {self.seq_len:,} x {self.world_size} rank(s) = "
            f"{self.micro_tokens:,}; {advice}"
        )

    def __str__(self) -> str:
        return (
            f"{self.micro_batch_size} sequences x {self.seq_len:,} tokens x {self.world_size} rank(s) x "
            f"{self.grad_accum_steps} accumulation step(s) = {self.batch_tokens:,} tokens per step"
        )


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """The batch of a run on a number of ranks."""
    train = config.train
    # "auto" counts as one sequence: that divides the batch if any number does.
    micro_batch_size = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    return BatchPlan(train.batch_tokens, config.model.max_seq_len, micro_batch_size, world_size)
