"""The loader hands out what direct reads give, from any position, on any number of ranks, and ends when told."""

import contextlib
import itertools
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.data import dataloader, sampler
from myllm.data import dataset as dataset_module
from myllm.data.dataloader import Batch, BatchLoader, read_batch
from myllm.data.dataset import Dataset
from myllm.data.order import StreamOrder
from myllm.data.preparation_lock import PreparationEnded
from myllm.data.sampler import DataPosition, count_sequences, step_sequences
from myllm.data.token_stream import TokenStream
from myllm.errors import UserError
from myllm.planning.batch import BatchPlan

if TYPE_CHECKING:
    from conftest import Growing

MakeDataset = Callable[..., Dataset]
MakeGrowing = Callable[[Dataset], "Growing"]
CPU = torch.device("cpu")
T = 8


@pytest.fixture(scope="session")
def dataset(make_dataset: MakeDataset) -> Dataset:
    """50 sequences of 8 in five shards, each token its own place."""
    return make_dataset(np.arange(50 * T + 3), np.arange(40), shard_tokens=90)


def plan(world_size: int = 1, micro: int = 2, sequences: int = 8) -> BatchPlan:
    return BatchPlan(sequences * T, T, micro, world_size)


def take(dataset: Dataset, count: int, position: DataPosition, batch: BatchPlan, rank: int = 0) -> list[Batch]:
    with BatchLoader(StreamOrder(dataset.train, T), batch, position, rank, CPU) as loader:
        return [loader.next_batch() for _ in range(count)]


def at(epoch: int, index: int) -> DataPosition:
    return DataPosition(epoch, index, 3, "hash")


def sequences_of(batches: list[Batch]) -> list[int]:
    """Which sequences were in the batches: their first token says so."""
    return [int(first) // T for tokens, _ in batches for first in tokens[:, 0]]


def test_batch_reads_stream_windows(dataset: Dataset) -> None:
    tokens, targets = read_batch(StreamOrder(dataset.train, T), np.array([0, 11, 49]))
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous()
    assert targets.is_contiguous()
    assert tokens.tolist() == [list(range(i * T, i * T + T)) for i in (0, 11, 49)]
    assert (targets == tokens + 1).all()


def test_batches_equal_direct_reads(dataset: Dataset) -> None:
    position = at(0, 0)
    batches = take(dataset, 4 * 10, position, plan())
    for step in range(10):  # 80 sequences: over the end of the first epoch
        sequences = step_sequences(position, 8, 50, 50)
        for micro_step in range(4):
            tokens, targets = batches[4 * step + micro_step]
            for row, sequence in enumerate(sequences[2 * micro_step : 2 * micro_step + 2]):
                whole = dataset.train.read(int(sequence) * T, T + 1).tolist()
                assert tokens[row].tolist() == whole[:-1]
                assert targets[row].tolist() == whole[1:]
        position = position.advance(8, 50)


def test_epoch_covers_all_sequences_once(dataset: Dataset) -> None:
    assert count_sequences(dataset.train.tokens, T) == 50
    seen = sequences_of(take(dataset, 50, at(0, 0), plan(micro=2, sequences=4)))
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert seen[:50] != seen[50:]


@settings(max_examples=25)
@given(st.integers(0, 12), st.sampled_from([2, 4, 8, 16]))
def test_resume_at_any_step_matches_uninterrupted(dataset: Dataset, steps: int, sequences: int) -> None:
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
def test_order_independent_of_ranks(dataset: Dataset, world_size: int, micro: int) -> None:
    alone = sequences_of(take(dataset, 8 * 7, at(1, 40), plan(micro=1)))
    batch = plan(world_size, micro)
    ranks = [take(dataset, 7 * batch.grad_accum_steps, at(1, 40), batch, rank) for rank in range(world_size)]
    interleaved = [batches for step in zip(*ranks, strict=True) for batches in step]
    assert sequences_of(interleaved) == alone


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_thread_stops_on_exit(dataset: Dataset, taken: int) -> None:
    take(dataset, taken, at(0, 0), plan())
    assert loader_threads() == []
    with pytest.raises(KeyError), BatchLoader(StreamOrder(dataset.train, T), plan(), at(0, 0), 0, CPU):
        raise KeyError
    assert loader_threads() == []


class Failing:
    """A stream that breaks at its tenth read."""

    def __init__(self, stream: TokenStream, error: BaseException) -> None:
        self.complete, self.tokens, self._stream, self._error, self._reads = (
            True, stream.tokens, stream, error, itertools.count()
        )  # fmt: skip
        self.dataset = stream.dataset

    def verify(self, starts: np.ndarray, count: int) -> None:
        self._stream.verify(starts, count)

    def read(self, start: int, count: int) -> np.ndarray:
        if next(self._reads) >= 10:
            raise self._error
        return self._stream.read(start, count)


@pytest.mark.parametrize("error", [OSError("disk gone"), ValueError("odd"), SystemExit("out")])
def test_thread_error_propagates_to_consumer(dataset: Dataset, error: BaseException) -> None:
    with BatchLoader(StreamOrder(Failing(dataset.train, error), T), plan(), at(0, 0), 0, CPU) as loader:
        for _ in range(5):
            loader.next_batch()
        for _ in range(3):  # and a later call does not hang
            with pytest.raises(type(error), match=str(error)):
                loader.next_batch()
    assert loader_threads() == []


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_refuse_damaged_shard_at_same_step(make_dataset: MakeDataset, rank: int) -> None:
    """Also the rank whose own rows are intact: it would wait for the other one."""
    path = make_dataset(np.arange(50 * T + 3), np.arange(40), shard_tokens=90).folder / "train_00004.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    is_damaged = step_sequences(at(0, 0), 48, 50, 50).reshape(12, 4) >= 44  # the last row's target is in the shard
    step = int(is_damaged.any(axis=1).argmax())
    assert is_damaged[step].sum() == 1
    with BatchLoader(StreamOrder(Dataset.open(path.parent).train, T), plan(2, 2, 4), at(0, 0), rank, CPU) as loader:
        for _ in range(step):
            loader.next_batch()
        with pytest.raises(UserError, match=path.name):
            loader.next_batch()


def test_empty_stream_raises(make_dataset: MakeDataset) -> None:
    short = make_dataset(np.arange(T), np.arange(T))
    with BatchLoader(StreamOrder(short.train, T), plan(), at(0, 0), 0, CPU) as loader, pytest.raises(AssertionError):
        loader.next_batch()


def test_wait_time_counted(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the thread moves by 7 s once the batch is waited for."""
    now, is_waited_for = [0.0], threading.Event()

    def clock() -> float:
        reading = now[0]
        is_waited_for.set()
        return reading

    class Slow(Failing):
        def read(self, start: int, count: int) -> np.ndarray:
            if not now[0]:
                is_waited_for.wait()
                now[0] = 7.0
            return self._stream.read(start, count)

    monkeypatch.setattr(dataloader, "time", SimpleNamespace(perf_counter=clock))
    with BatchLoader(StreamOrder(Slow(dataset.train, OSError()), T), plan(), at(0, 0), 0, CPU) as loader:
        loader.next_batch()
        assert loader.wait_s == 7


# -- data that are still being made -----------------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 6 sequences: shards end within them, and so do steps."""
    monkeypatch.setattr(sampler, "WINDOW_TOKENS", 6 * T)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("sequences", [2, 8, 48, 64])
def test_growing_dataset_matches_complete_dataset(
    dataset: Dataset, make_growing: MakeGrowing, world_size: int, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ends of windows and of epochs; each rank looks for itself."""
    monkeypatch.setattr(BatchLoader, "POLL_S", 0.005)
    batch = plan(world_size, 1, sequences)
    count = (2 * 50 // sequences + 2) * batch.grad_accum_steps
    for rank in range(world_size):
        expected = take(dataset, count, at(0, 0), batch, rank)
        growing = make_growing(dataset)
        growing.grow(2)
        chance = random.Random(rank)

        def make_the_rest(growing: "Growing" = growing, chance: random.Random = chance) -> None:
            while not growing.whole:
                time.sleep(chance.uniform(0, 0.03))
                growing.grow()
            time.sleep(chance.uniform(0, 0.03))
            growing.finish()

        thread = threading.Thread(target=make_the_rest)
        thread.start()
        seen = take(Dataset.open(growing.folder, allow_incomplete=True), count, at(0, 0), batch, rank)
        thread.join()
        for (a, b), (x, y) in zip(seen, expected, strict=True):
            assert torch.equal(a, x)
            assert torch.equal(b, y)


@pytest.mark.usefixtures("small_windows")
def test_step_unavailable_until_windows_complete(dataset: Dataset, make_growing: MakeGrowing) -> None:
    """A window is 6 sequences, a shard 90 tokens: 11 sequences and a bit."""
    growing = make_growing(dataset)
    growing.grow(2)
    seen, batch = Dataset.open(growing.folder, allow_incomplete=True), plan(sequences=2, micro=2)
    steps = [i for i in range(20) if StreamOrder(seen.train, T).has(at(0, 2 * i), batch.sequences)]
    assert seen.train.tokens == 90
    assert steps == [0, 1, 2], "11 sequences are there: one window of 6"
    growing.grow()
    seen.refresh()
    assert [i for i in range(20) if StreamOrder(seen.train, T).has(at(0, 2 * i), batch.sequences)] == list(range(9))
    assert not StreamOrder(seen.train, T).has(at(1, 0), batch.sequences), "a later epoch needs all of it"
    growing.finish()
    seen.refresh()
    assert StreamOrder(seen.train, T).has(at(1, 0), batch.sequences)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("there", [1, 2])
def test_waiting_loader_stops_on_exit(dataset: Dataset, make_growing: MakeGrowing, there: int) -> None:
    growing = make_growing(dataset)
    growing.grow(there)
    seen = Dataset.open(growing.folder, allow_incomplete=True)
    with BatchLoader(StreamOrder(seen.train, T), plan(), at(0, 40), 0, CPU):
        time.sleep(0.05)
    assert loader_threads() == []


@pytest.mark.usefixtures("small_windows")
def test_deleted_dataset_raises_while_waiting(
    dataset: Dataset, make_growing: MakeGrowing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchLoader, "POLL_S", 0.01)
    growing = make_growing(dataset)
    growing.grow(2)
    seen = Dataset.open(growing.folder, allow_incomplete=True)
    shutil.rmtree(growing.folder)
    with (
        BatchLoader(StreamOrder(seen.train, T), plan(), at(0, 40), 0, CPU) as loader,
        pytest.raises(UserError, match="not a prepared"),
    ):
        loader.next_batch()


@pytest.mark.usefixtures("small_windows")
def test_resume_within_and_after_windows(dataset: Dataset) -> None:
    batch = plan(sequences=4)
    whole = take(dataset, 2 * 30, at(0, 0), batch)
    position = at(0, 0)
    for step in range(26):
        resumed = take(dataset, 2, position, batch)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, whole[2 * step :], strict=False)), step
        position = position.advance(4, 50)


# -- waiting for the next step ----------------------------------------------------------------------------------------


class Wait:
    """A growing data set whose next step is waited for; the test decides what happens meanwhile."""

    def __init__(self, growing: "Growing", monkeypatch: pytest.MonkeyPatch) -> None:
        self.growing, self.lines, self.events = growing, [], []
        self.dataset = Dataset.open(growing.folder, allow_incomplete=True)
        monkeypatch.setattr(BatchLoader, "POLL_S", 0.005)
        monkeypatch.setattr(dataset_module, "is_being_prepared", lambda _: not self.abandoned)
        monkeypatch.setattr(time, "sleep", self.between_looks)
        self.abandoned, self.looks, self.do = False, 0, lambda look: None

    def between_looks(self, _: float) -> None:
        self.looks += 1
        assert self.looks < 100, "it waits in vain"
        self.do(self.looks)

    def __call__(self, loader: BatchLoader, stop: Callable[[], bool] = lambda: False) -> bool:
        return loader.wait_for_step(stop, self.lines.append, self.waiting, lambda: self.events.append("complete"))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self.events.append("waiting")
        yield
        self.events.append("waited")


@pytest.fixture
def wait(dataset: Dataset, make_growing: MakeGrowing, monkeypatch: pytest.MonkeyPatch) -> Wait:
    growing = make_growing(dataset)
    growing.grow(2)
    return Wait(growing, monkeypatch)


@pytest.mark.usefixtures("small_windows")
def test_available_step_does_not_wait(wait: Wait) -> None:
    with BatchLoader(StreamOrder(wait.dataset.train, T), plan(sequences=2), at(0, 0), 0, CPU) as loader:
        assert wait(loader)
    assert (wait.lines, wait.events, wait.looks) == ([], [], 0)


@pytest.mark.usefixtures("small_windows")
def test_wait_ends_when_shards_arrive(wait: Wait) -> None:
    wait.do = lambda look: wait.growing.grow() if look == 3 else None
    with BatchLoader(StreamOrder(wait.dataset.train, T), plan(), at(0, 8), 0, CPU) as loader:
        assert wait(loader)
        assert wait.events == ["waiting", "waited"]
        [line] = wait.lines
        assert line.startswith("waiting for data: 90 training tokens so far")
        wait.do = lambda look: wait.growing.finish()
        loader.position = at(0, 48)
        assert wait(loader)
        assert wait.events[2:] == ["waiting", "waited", "complete"]
        wait.do = lambda look: pytest.fail("it waited")
        assert wait(loader)
        assert wait(loader)
    assert wait.events.count("complete") == 1


def test_reports_completion_before_first_wait(wait: Wait) -> None:
    """The loader's thread may find the data set complete before training first waits for a step."""
    with BatchLoader(StreamOrder(wait.dataset.train, T), plan(), at(0, 0), 0, CPU) as loader:
        wait.growing.finish()
        wait.dataset.refresh()
        assert wait(loader)
        assert wait(loader)
    assert wait.events == ["complete"]


@pytest.mark.usefixtures("small_windows")
def test_stop_request_ends_wait_without_preparation(wait: Wait) -> None:
    with BatchLoader(StreamOrder(wait.dataset.train, T), plan(), at(0, 8), 0, CPU) as loader:
        assert not wait(loader, stop=lambda: wait.looks == 2)
        wait.abandoned = True
        assert not wait(loader, stop=lambda: True)
        with pytest.raises(PreparationEnded, match="run the same command again: finished work is kept"):
            wait(loader)


def test_position_follows_consumed_batches(dataset: Dataset) -> None:
    """2 steps of 8 sequences in 4 micro-batches, at the end of an epoch of 50."""
    batch = plan(sequences=8, micro=2)
    with BatchLoader(StreamOrder(dataset.train, T), batch, at(0, 40), 0, CPU) as loader:
        positions = [loader.next_batch() and (loader.position.epoch, loader.position.index) for _ in range(8)]
    assert positions == [(0, 40)] * 3 + [(0, 48)] * 4 + [(1, 6)]
