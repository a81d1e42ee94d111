"""Moving batches to the device: the loader's thread calls `send`, the training thread `receive`.

What `send` returns is passed to `receive`, in order.

Shapes: B micro-batch, T sequence.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, (B, T) int64 each."""


def make_transfer(device: torch.device) -> "CudaTransfer | HostTransfer":
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer(device)


class HostTransfer:
    """For CPU and MPS. The loader's thread builds the batch.

    On MPS the training thread copies it and waits: a non-blocking copy would read host memory after it was freed
    (pytorch/pytorch#189690).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, rows: np.ndarray) -> Batch:
        return inputs_and_targets(rows)

    def receive(self, sent: Batch) -> Batch:
        tokens, targets = sent
        return tokens.to(self._device), targets.to(self._device)


class CudaTransfer:
    """For CUDA: copies from pinned memory on a side stream, in parallel with the computation.

    The loader's thread queues the copy and an event after it. The training stream waits for that event, its thread does
    not. Two bytes per token (four in a large vocabulary) are copied, and become a batch on the device.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """
        Args:
            cuda: replaced in tests.
        """
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)

    def send(self, rows: np.ndarray) -> tuple[Tensor, Any]:
        """Start the copy of rows, (B, T + 1) uint16 or uint32."""
        # The stream's context also sets this thread's device. Without it, pinning would open a context on GPU 0.
        with self._cuda.stream(self._stream):
            # The pinned allocator does not reuse the memory before the copy is done.
            rows_on_device = pin_rows(rows).to(self._device, non_blocking=True)
            copied = self._cuda.Event()
            copied.record(self._stream)
        return rows_on_device, copied

    def receive(self, sent: tuple[Tensor, Any]) -> Batch:
        """The batch on the device, complete for all work that is queued later."""
        rows_on_device, copied = sent
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(copied)
        rows_on_device.record_stream(stream)  # or the next copy could take its memory while this stream still reads it
        return inputs_and_targets_on_device(rows_on_device)


def pin_rows(rows: np.ndarray) -> Tensor:
    """The bits of (B, T + 1) uint16 or uint32 in pinned memory, as int16 or int32."""
    bits = rows.view(f"i{rows.itemsize}")  # few devices can compute with unsigned integers
    host = torch.empty(bits.shape, dtype=torch.int16 if bits.itemsize == 2 else torch.int32, pin_memory=True)
    host.numpy()[:] = bits
    return host


def inputs_and_targets(rows: np.ndarray) -> Batch:
    """A batch in host memory.

    Shapes:
        rows (B, T + 1) uint16 or uint32
    """
    # With NumPy: in the loader's thread torch would start a second OpenMP pool.
    tokens = rows.astype(np.int64)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def inputs_and_targets_on_device(rows: Tensor) -> Batch:
    """The same on the device of the rows.

    Shapes:
        rows (B, T + 1) int16 with the bits of uint16, or int32 with those of uint32
    """
    tokens = rows.to(torch.int64) & (0xFFFF if rows.dtype == torch.int16 else 0xFFFF_FFFF)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
