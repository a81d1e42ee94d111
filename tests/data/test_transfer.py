"""A batch that is copied beside the computation is whole before anything reads it.

The device here is a pretended one: a copy that does not block leaves garbage until its stream has got that far, as on
CUDA. Real tensors, so too early a look gives wrong numbers and not only another order of calls.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from myllm.data import transfer
from myllm.data.dataloader import BatchLoader
from myllm.data.sampler import DataPosition
from myllm.data.transfer import (
    CudaTransfer,
    HostTransfer,
    inputs_and_targets,
    inputs_and_targets_on_device,
    make_transfer,
    pin_rows,
)
from myllm.planning.batch import BatchPlan

GARBAGE = -7
ROWS = np.array([[0, 1, 2, 32_767], [32_768, 50_256, 65_534, 65_535]], dtype=np.uint16)


class Stream:
    """Work that is queued and not yet done."""

    def __init__(self, name: str) -> None:
        self.name, self.queued = name, []

    def run(self, until: int | None = None) -> None:
        for work in self.queued[:until]:
            work()
        self.queued[:until] = [lambda: None] * len(self.queued[:until])


class Cuda:
    """What SideStream asks of torch.cuda."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.training = Stream("training")
        self.entered = threading.local()
        outer = self

        class Event:
            def record(self, stream: Stream) -> None:
                outer.calls.append(("record", stream.name, threading.current_thread().name))
                self.stream, self.place = stream, len(stream.queued)

        def wait_event(event: Event) -> None:
            outer.calls.append(("wait", threading.current_thread().name))
            event.stream.run(event.place)

        self.Event = Event
        self.training.wait_event = wait_event

    def Stream(self, device: torch.device) -> Stream:
        return Stream("side")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.entered.stream = stream
        yield
        self.entered.stream = None

    def current_stream(self, device: torch.device) -> Stream:
        return self.training


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake, to = Cuda(), torch.Tensor.to

    def copy(tensor: torch.Tensor, *args: Any, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return to(tensor, *args)
        there = torch.full_like(tensor, GARBAGE)
        fake.calls.append(("copy", fake.entered.stream.name, threading.current_thread().name))
        fake.entered.stream.queued.append(lambda: there.copy_(tensor))
        return there

    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: fake.calls.append(("keep", tensor.dtype, stream.name))
    )
    monkeypatch.setattr(transfer, "pin_rows", bits)
    return fake


def expected() -> tuple[list[list[int]], list[list[int]]]:
    return ROWS[:, :-1].astype(int).tolist(), ROWS[:, 1:].astype(int).tolist()


def bits(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.view(np.int16 if rows.dtype == np.uint16 else np.int32).copy())


@pytest.mark.parametrize("make", [inputs_and_targets, lambda rows: inputs_and_targets_on_device(bits(rows))])
def test_transfer_preserves_all_token_ids(make: Callable[[np.ndarray], transfer.Batch]) -> None:
    """uint16 and uint32 on the host, or their bits as int16 and int32 on the device."""
    every = np.arange(65_536, dtype=np.uint16).reshape(2, -1)
    wide = np.array([[0, 65_535, 65_536], [151_668, 2**31, 2**32 - 1]], dtype=np.uint32)
    for rows in (ROWS, every, wide):
        tokens, targets = make(rows)
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.is_contiguous()
        assert targets.is_contiguous()
        assert tokens.tolist() == rows[:, :-1].astype(int).tolist()
        assert targets.tolist() == rows[:, 1:].astype(int).tolist()


def test_copy_record_wait_order(cuda: Cuda) -> None:
    way = CudaTransfer(torch.device("cpu"), cuda)
    sent = way.send(ROWS)
    assert (sent[0] == GARBAGE).all(), "the copy is queued and not done"
    tokens, targets = way.receive(sent)
    assert (tokens.tolist(), targets.tolist()) == expected()
    main = threading.current_thread().name
    assert cuda.calls == [
        ("copy", "side", main), ("record", "side", main), ("wait", main), ("keep", torch.int16, "training")
    ]  # fmt: skip


def test_fake_device_detects_missing_wait(cuda: Cuda) -> None:
    """What the test above would not notice otherwise."""
    cuda.training.wait_event = lambda event: None
    way = CudaTransfer(torch.device("cpu"), cuda)
    tokens, _ = way.receive(way.send(ROWS))
    assert tokens.tolist() != expected()[0]


def test_batch_waits_only_for_own_copy(cuda: Cuda) -> None:
    way = CudaTransfer(torch.device("cpu"), cuda)
    first, second = way.send(ROWS), way.send(ROWS[::-1].copy())
    assert way.receive(first)[0].tolist() == expected()[0]
    assert (second[0] == GARBAGE).all(), "the next copy is still under way"
    assert way.receive(second)[0].tolist() == expected()[0][::-1]


def test_loader_thread_copies_main_thread_waits(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, make_dataset: Callable[..., Any]
) -> None:
    dataset = make_dataset(np.arange(40 * 8 + 3), np.arange(40), shard_tokens=90)
    batch, position, cpu = BatchPlan(32, 8, 2, 1), DataPosition(0, 0, 3, "hash"), torch.device("cpu")
    with BatchLoader(dataset.order(batch), batch, position, 0, cpu) as loader:
        plain = [loader.next_batch() for _ in range(30)]
    monkeypatch.setattr("myllm.data.dataloader.make_transfer", lambda device: CudaTransfer(device, cuda))
    with BatchLoader(dataset.order(batch), batch, position, 0, cpu) as loader:
        streamed = [loader.next_batch() for _ in range(30)]
    for a, b in zip(plain, streamed, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert {call[-1] for call in cuda.calls if call[0] in ("copy", "record")} == {"loader"}
    assert {call[-1] for call in cuda.calls if call[0] == "wait"} == {threading.current_thread().name}


def test_cpu_and_mps_use_host_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: copies.append((device, how)) or tensor)
    for name in ("cpu", "mps"):
        way = make_transfer(torch.device(name))
        assert isinstance(way, HostTransfer)
        tokens, targets = way.receive(way.send(ROWS))
        assert (tokens.tolist(), targets.tolist()) == expected()
        assert copies == [(torch.device(name), {})] * 2, "a copy that blocks"
        copies.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_cuda_transfer() -> None:
    way = make_transfer(torch.device("cuda", 0))
    assert pin_rows(ROWS).is_pinned()
    for _ in range(100):
        tokens, targets = way.receive(way.send(ROWS))
        assert (tokens.tolist(), targets.tolist()) == expected()
