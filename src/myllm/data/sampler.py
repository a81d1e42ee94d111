"""Which sequence comes when: a pure function of the data set, the seed and the epoch.

Sequence i of a stream is tokens [i T, i T + T]: its last token is only a target, and the next sequence's first input.
So an epoch trains on every token once. The first epoch shuffles within windows of WINDOW_TOKENS, so training can begin
while later windows are still being prepared. Later epochs shuffle everything. The order does not depend on ranks: a
step takes the next sequences, and each rank computes which of them are its own.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

WINDOW_TOKENS = 1 << 27
"""134M: more than a shard, so a window mixes several files; a minute or two of preparation."""


@dataclass(frozen=True)
class DataPosition:
    """How far training is in its data. Global: the same on every rank, for any number of ranks."""

    epoch: int
    index: int
    """Sequences of this epoch that are done."""
    seed: int
    dataset_hash: str

    def advance(self, sequences: int, epoch_sequences: int | None) -> "DataPosition":
        """The position after `sequences` more; a step may cross the end of an epoch.

        Args:
            epoch_sequences: in an epoch. None: not known yet, which is only possible in the first epoch.
        """
        if epoch_sequences is None:
            return replace(self, index=self.index + sequences)
        done = self.epoch * epoch_sequences + self.index + sequences
        return replace(self, epoch=done // epoch_sequences, index=done % epoch_sequences)


def count_sequences(tokens: int, seq_len: int) -> int:
    """Whole sequences in a stream. Each needs one more token, which it shares with the next."""
    return max(tokens - 1, 0) // seq_len


def window_sequences(seq_len: int) -> int:
    """Sequences that the first epoch shuffles together."""
    return max(WINDOW_TOKENS // seq_len, 1)


@lru_cache(maxsize=4)  # each step needs one, and two at the end of a window
def window_order(start: int, size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the sequences [start, start + size).

    Integer arithmetic only: unlike a random generator's, the result is the same in all versions of NumPy.

    Shapes:
        returns (size,) int64, read-only
    """
    # The key mixes epoch and seed, so that neighboring seeds share no epoch's order.
    key = hash64(hash64(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    order = start + np.argsort(hash64(np.arange(start, start + size, dtype=np.uint64) ^ key), kind="stable")
    order.setflags(write=False)
    return order


def step_sequences(position: DataPosition, count: int, n_sequences: int, window: int) -> np.ndarray:
    """The next `count` sequences, in order, also across the end of an epoch.

    Args:
        n_sequences: in the stream. If it is still growing, at least `sequences_needed`.
        window: sequences that the first epoch shuffles together.

    Shapes:
        returns (count,) int64
    """
    assert n_sequences > 0, "no sequence to take"
    parts, remaining = [], count
    epoch, index = position.epoch, position.index
    while remaining:
        size = window if epoch == 0 else n_sequences
        start = index // size * size
        order = window_order(start, min(size, n_sequences - start), position.seed, epoch)
        part = order[index - start : index - start + remaining]
        parts.append(part)
        remaining -= len(part)
        index += len(part)
        if index == n_sequences:
            epoch, index = epoch + 1, 0
    return np.concatenate(parts)


def sequences_needed(position: DataPosition, count: int, window: int) -> int | None:
    """How many sequences of a growing stream decide the next `count`: whole windows. None: all (after epoch 0)."""
    return None if position.epoch else -(-(position.index + count) // window) * window


def rank_rows(micro_step: int, rank: int, world_size: int, micro_batch_size: int) -> slice:
    """The slice of a step's sequences that a rank takes in a micro-step."""
    start = (micro_step * world_size + rank) * micro_batch_size
    return slice(start, start + micro_batch_size)


def hash64(x: np.ndarray) -> np.ndarray:
    """A bijective hash of 64-bit integers.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17's mix64variant13.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around, as needed here
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
