"""Batch arithmetic: batch_tokens cut over ranks, micro-batches and accumulation steps."""

import math
from dataclasses import dataclass

from myllm.config import RunConfig


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


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    train = config.train
    # Until "auto" is a number, one sequence stands for it: it multiplies to the whole wherever any number does.
    micro_batch_size = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    return BatchPlan(train.batch_tokens, config.model.max_seq_len, micro_batch_size, world_size)


def micro_batch_sizes(config: RunConfig, world_size: int) -> list[int]:
    """Every micro-batch size that keeps batch_tokens exact on so many ranks, ascending; none if there is none."""
    share, remainder = divmod(config.train.batch_tokens, config.model.max_seq_len * world_size)
    if remainder:
        return []
    below = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    return sorted({*below, *(share // size for size in below)})
