"""How a batch gets from the loader's thread to training: `send` there, `receive` here.

Shapes: B micro-batch, T sequence.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, (B, T) int64 each."""


class Transfer(Protocol):
    """The two ends of the way. What `send` gives is handed to `receive`, in order."""

    def send(self, rows: np.ndarray) -> Any:
        """In the loader's thread: begin to move rows, (B, T + 1) uint16."""

    def receive(self, sent: Any) -> Batch:
        """In training's thread: the batch, on the device, as far as work that is queued later can tell."""


def make_transfer(device: torch.device) -> Transfer:
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer(device)


class HostTransfer:
    """For a device that reads host memory. The loader's thread makes the batch; on a CPU that is all.

    MPS copies it when training asks, and training waits. A copy that does not block would read the host's memory after
    it was freed (pytorch/pytorch#189690).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, rows: np.ndarray) -> Batch:
        return inputs_and_targets(rows)

    def receive(self, sent: Batch) -> Batch:
        tokens, targets = sent
        return tokens.to(self._device), targets.to(self._device)


class CudaTransfer:
    """For CUDA: copies on a stream of their own, from pinned memory, beside the computation.

    The loader's thread queues the copy and behind it an event. Training's stream, not its thread, waits for that event.
    Two bytes a token travel; a batch is made of them on the device.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """
        Args:
            cuda: stands in for torch.cuda in tests.
        """
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)

    def send(self, rows: np.ndarray) -> tuple[Tensor, Any]:
        # The stream's context makes its device this thread's too. Without, pinning would open a context on GPU 0.
        with self._cuda.stream(self._stream):
            # The allocator of pinned memory gives it to nobody else before the copy is done.
            there = pin_rows(rows).to(self._device, non_blocking=True)
            copied = self._cuda.Event()
            copied.record(self._stream)
        return there, copied

    def receive(self, sent: tuple[Tensor, Any]) -> Batch:
        there, copied = sent
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(copied)
        there.record_stream(stream)  # else its memory could be the next copy's while this stream still reads it
        return inputs_and_targets_on_device(there)


def pin_rows(rows: np.ndarray) -> Tensor:
    """The bits of (B, T + 1) uint16 in pinned memory, as int16."""
    host = torch.empty(rows.shape, dtype=torch.int16, pin_memory=True)
    host.numpy()[:] = rows.view(np.int16)
    return host


def inputs_and_targets(rows: np.ndarray) -> Batch:
    """The batch that rows hold, in host memory.

    Shapes:
        rows (B, T + 1) uint16
    """
    # NumPy alone: in the loader's thread torch would open a second pool of threads.
    tokens = rows.astype(np.int64)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def inputs_and_targets_on_device(rows: Tensor) -> Batch:
    """The same on the rows' device.

    Shapes:
        rows (B, T + 1) int16 with the bits of uint16, which not every device can compute with
    """
    tokens = rows.to(torch.int64) & 0xFFFF
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
