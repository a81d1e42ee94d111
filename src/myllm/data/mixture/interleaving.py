"""Which component of a mixture each sequence of a run comes from.

The order is a pure function of weights, seed and batch. A block of sequences holds each component exactly as often as
its weights say. Inside it, item i of a component's m items gets the place (i + u) / m, where u in [0, 1) is a hash, and
the places are sorted: every component is spread evenly, and no pattern repeats. In every prefix of a stage with C
components, a component of weight w is within 1 + w (C - 2) sequences of its share.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from myllm.data.sampler import hash64

from .spec import Stage

MIN_BLOCK = 4_096
"""Sequences of a block, at least."""


@dataclass(frozen=True)
class Interleaving:
    """Which component each sequence of a run comes from."""

    stages: tuple[Stage, ...]
    step_sequences: int
    """Sequences of a step, over all ranks."""
    seed: int

    def counts(self, n: int) -> np.ndarray:
        """How many of a run's first n sequences come from each component: (C,) int64. The time does not grow with n."""
        counts = np.zeros(len(self.stages[0].weights), dtype=np.int64)
        for number, stage, start, end in self._spans():
            if n > start:
                blocks, rest = divmod(min(n, end) - start, _block_size(stage))
                begun = _block(stage, number, blocks, self.seed)[:rest]
                counts += blocks * _block_counts(stage) + np.bincount(begun, minlength=len(counts))
        return counts

    def components(self, n: int, count: int) -> np.ndarray:
        """The components of `count` sequences from the n-th on, (count,) int64."""
        parts = []
        for number, stage, start, end in self._spans():
            while count and n < end:
                block, index = divmod(n - start, _block_size(stage))
                take = min(count, _block_size(stage) - index, end - n)
                parts.append(_block(stage, number, block, self.seed)[index : index + take])
                n, count = n + take, count - take
        return np.concatenate(parts)

    def _spans(self) -> Iterator[tuple[int, Stage, int, int]]:
        """The stages with their numbers, first sequences and ends."""
        starts = [stage.step * self.step_sequences for stage in self.stages]
        for number, (stage, start, end) in enumerate(zip(self.stages, starts, [*starts[1:], sys.maxsize], strict=True)):
            yield number, stage, start, end


@lru_cache(maxsize=4)
def _block(stage: Stage, stage_number: int, number: int, seed: int) -> np.ndarray:
    """The components of one block of a stage, in order: (block size,) int64, read-only."""
    key = np.array([seed], dtype=np.uint64)
    for value in (stage_number, number):
        key = hash64(hash64(key) + np.uint64(value))
    counts = _block_counts(stage)
    components = np.repeat(np.arange(len(counts)), counts)
    items = np.concatenate([np.arange(count, dtype=np.uint64) for count in counts])
    jitter = hash64(key ^ (items + (components.astype(np.uint64) << np.uint64(32)))) >> np.uint64(32)
    # Exact in float64, and division is correctly rounded: the same on every machine.
    places = ((items << np.uint64(32)) + jitter).astype(np.float64) / counts[components]
    order = components[np.argsort(places, kind="stable")]
    order.setflags(write=False)
    return order


def _block_size(stage: Stage) -> int:
    """Sequences after which every component has exactly its share."""
    denominator = math.lcm(*(weight.denominator for weight in stage.weights))
    return denominator * -(-MIN_BLOCK // denominator)


def _block_counts(stage: Stage) -> np.ndarray:
    """Sequences of each component in a block, (C,) int64."""
    size = _block_size(stage)
    return np.array([int(weight * size) for weight in stage.weights], dtype=np.int64)


def fit_weights(weights: np.ndarray, room: np.ndarray) -> np.ndarray | None:
    """Weights in the given proportions, except that none exceeds its room; None if all room is less than 1.

    Shapes:
        weights, room (C,); returns (C,) float64 of four decimals
    """
    units = 10_000
    room = np.floor(np.minimum(room, 1) * units)
    if room.sum() < units:
        return None
    parts = np.zeros(len(weights))
    for _ in range(units):  # each to the component that is furthest behind its weight: D'Hondt's method
        parts[np.argmax(np.where(parts < room, weights / (parts + 1), 0))] += 1
    return parts / units
