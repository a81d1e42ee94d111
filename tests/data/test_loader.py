"""The loader hands out what direct reads give, from any position, on any number of ranks, and ends when told."""

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.data.loader import Batch, Loader, batch_of
from myllm.data.order import DataPosition, count_sequences, step_sequences
from myllm.data.shards import Dataset, TokenStream
from myllm.plan import BatchPlan

MakeDataset = Callable[..., Dataset]
CPU = torch.device("cpu")
T = 8


@pytest.fixture(scope="session")
def dataset(make_dataset: MakeDataset) -> Dataset:
    """50 sequences of 8 in five shards, each token its own place."""
    return make_dataset(np.arange(50 * T + 3), np.arange(40), shard_tokens=90)


def plan(world_size: int = 1, micro: int = 2, sequences: int = 8) -> BatchPlan:
    return BatchPlan(sequences * T, T, micro, world_size)


def take(dataset: Dataset, count: int, position: DataPosition, batch: BatchPlan, rank: int = 0) -> list[Batch]:
    with Loader(dataset.train, batch, position, rank, CPU) as loader:
        return [loader.next() for _ in range(count)]


def at(epoch: int, index: int) -> DataPosition:
    return DataPosition(epoch, index, 3, "hash")


def sequences_of(batches: list[Batch]) -> list[int]:
    """Which sequences were in the batches: their first token says so."""
    return [int(first) // T for tokens, _ in batches for first in tokens[:, 0]]


def test_a_batch_is_windows_of_the_stream(dataset: Dataset) -> None:
    tokens, targets = batch_of(dataset.train, np.array([0, 11, 49]), T)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous()
    assert targets.is_contiguous()
    assert tokens.tolist() == [list(range(i * T, i * T + T)) for i in (0, 11, 49)]
    assert (targets == tokens + 1).all()


def test_batches_equal_direct_reads(dataset: Dataset) -> None:
    position = at(0, 0)
    batches = take(dataset, 4 * 10, position, plan())
    for step in range(10):  # 80 sequences: over the end of the first epoch
        order = step_sequences(position, 8, 50)
        for micro_step in range(4):
            tokens, targets = batches[4 * step + micro_step]
            for row, sequence in enumerate(order[2 * micro_step : 2 * micro_step + 2]):
                whole = dataset.train.read(int(sequence) * T, T + 1).tolist()
                assert tokens[row].tolist() == whole[:-1]
                assert targets[row].tolist() == whole[1:]
        position = position.advance(8, 50)


def test_an_epoch_has_every_sequence_once(dataset: Dataset) -> None:
    assert count_sequences(dataset.train.tokens, T) == 50
    seen = sequences_of(take(dataset, 50, at(0, 0), plan(micro=2, sequences=4)))
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert seen[:50] != seen[50:]


@settings(max_examples=25)
@given(st.integers(0, 12), st.sampled_from([2, 4, 8, 16]))
def test_resuming_anywhere_goes_on_as_if_never_stopped(dataset: Dataset, steps: int, sequences: int) -> None:
    batch = plan(sequences=sequences)
    whole = take(dataset, (steps + 3) * batch.grad_accum_steps, at(0, 0), batch)
    position = at(0, 0)
    for _ in range(steps):
        position = position.advance(batch.sequences, 50)
    resumed = take(dataset, 3 * batch.grad_accum_steps, position, batch)
    for a, b in zip(whole[steps * batch.grad_accum_steps :], resumed, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_the_order_knows_nothing_of_ranks(dataset: Dataset, world_size: int, micro: int) -> None:
    alone = sequences_of(take(dataset, 8 * 7, at(1, 40), plan(micro=1)))
    batch = plan(world_size, micro)
    ranks = [take(dataset, 7 * batch.grad_accum_steps, at(1, 40), batch, rank) for rank in range(world_size)]
    interleaved = [batches for step in zip(*ranks, strict=True) for batches in step]
    assert sequences_of(interleaved) == alone


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_the_thread_ends_with_the_block(dataset: Dataset, taken: int) -> None:
    take(dataset, taken, at(0, 0), plan())
    assert loader_threads() == []
    with pytest.raises(KeyError), Loader(dataset.train, plan(), at(0, 0), 0, CPU):
        raise KeyError
    assert loader_threads() == []


class Failing:
    """A stream that breaks at its tenth read."""

    def __init__(self, stream: TokenStream, error: BaseException) -> None:
        self.tokens, self._stream, self._error, self._reads = stream.tokens, stream, error, itertools.count()

    def read(self, start: int, count: int) -> np.ndarray:
        if next(self._reads) >= 10:
            raise self._error
        return self._stream.read(start, count)


@pytest.mark.parametrize("error", [OSError("disk gone"), ValueError("odd"), SystemExit("out")])
def test_what_the_thread_meets_reaches_training(dataset: Dataset, error: BaseException) -> None:
    with Loader(Failing(dataset.train, error), plan(), at(0, 0), 0, CPU) as loader:
        for _ in range(5):
            loader.next()
        for _ in range(3):  # and does not hang whoever asks again
            with pytest.raises(type(error), match=str(error)):
                loader.next()
    assert loader_threads() == []


def test_no_sequences_is_an_error_and_no_endless_loop(make_dataset: MakeDataset) -> None:
    short = make_dataset(np.arange(T), np.arange(T))
    with Loader(short.train, plan(), at(0, 0), 0, CPU) as loader, pytest.raises(AssertionError):
        loader.next()


def test_time_spent_waiting_is_counted(dataset: Dataset) -> None:
    class Slow(Failing):
        def read(self, start: int, count: int) -> np.ndarray:
            time.sleep(0.05)
            return self._stream.read(start, count)

    with Loader(Slow(dataset.train, OSError()), plan(), at(0, 0), 0, CPU) as loader:
        loader.next()
        assert 0.05 <= loader.wait_s < 5
