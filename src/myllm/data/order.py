"""Which sequences a run takes, and where their tokens are: what the loader asks of its data."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .sampler import DataPosition, count_sequences, sequences_needed, step_sequences, window_sequences
from .token_stream import TokenStream


class SequenceOrder(Protocol):
    """The training sequences of one data set (`StreamOrder`) or of several (`MixtureOrder`)."""

    @property
    def dataset(self) -> Any: ...

    def has(self, position: DataPosition, count: int) -> bool:
        """Whether the tokens of the next `count` sequences are there. A data set may be growing."""

    def take(self, position: DataPosition, count: int) -> np.ndarray:
        """The numbers of the next `count` sequences, (count,) int64."""

    def advance(self, position: DataPosition, count: int) -> DataPosition:
        """The position behind them."""

    def done(self, position: DataPosition) -> int:
        """Sequences of the whole run before a position."""

    def read(self, sequences: np.ndarray) -> np.ndarray:
        """Each with the token after it: (B,) -> (B, T + 1) of the data set's dtype."""

    def verify(self, sequences: np.ndarray) -> None:
        """Raises MachineError if a shard that holds them is damaged."""


@dataclass(frozen=True)
class StreamOrder:
    """The order of one stream."""

    stream: TokenStream
    seq_len: int

    @property
    def dataset(self) -> Any:
        return self.stream.dataset

    @property
    def n_sequences(self) -> int:
        return count_sequences(self.stream.tokens, self.seq_len)

    def has(self, position: DataPosition, count: int) -> bool:
        if self.stream.complete:
            return True
        needed = sequences_needed(position, count, window_sequences(self.seq_len))
        return needed is not None and self.n_sequences >= needed

    def take(self, position: DataPosition, count: int) -> np.ndarray:
        return step_sequences(position, count, self.n_sequences, window_sequences(self.seq_len))

    def advance(self, position: DataPosition, count: int) -> DataPosition:
        complete = self.stream.complete  # read before counting: a stream may grow in between, but never shrinks
        return position.advance(count, self.n_sequences if complete else None)

    def done(self, position: DataPosition) -> int:
        return position.epoch * self.n_sequences + position.index

    def read(self, sequences: np.ndarray) -> np.ndarray:
        return np.stack([self.stream.read(int(i) * self.seq_len, self.seq_len + 1) for i in sequences])

    def verify(self, sequences: np.ndarray) -> None:
        self.stream.verify(sequences * self.seq_len, self.seq_len + 1)
