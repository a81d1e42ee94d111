"""Batches for one rank, made ahead of time by a background thread.

Shapes: B micro-batch, T sequence.
"""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from myllm.planning.batch import BatchPlan

from .dataset import TokenStream
from .sample_digest import LANES, hash_samples
from .sampler import DataPosition, count_sequences, rank_rows, sequences_needed, step_sequences, window_sequences
from .transfer import Batch, inputs_and_targets, make_transfer


def read_batch(stream: TokenStream, sequences: np.ndarray, seq_len: int) -> Batch:
    """The named sequences as inputs and targets, the targets one token ahead.

    Shapes:
        sequences (B,); returns (B, T) int64 twice
    """
    stream.check(sequences * seq_len, seq_len + 1)
    return inputs_and_targets(read_rows(stream, sequences, seq_len))


def read_rows(stream: TokenStream, sequences: np.ndarray, seq_len: int) -> np.ndarray:
    """The named sequences, each with the token after it: (B, T + 1) uint16."""
    return np.stack([stream.read(int(i) * seq_len, seq_len + 1) for i in sequences])


def has_step(stream: TokenStream, position: DataPosition, plan: BatchPlan) -> bool:
    """Whether the step at a position can be made of what a stream holds by now."""
    if stream.complete:
        return True
    needed = sequences_needed(position, plan.sequences, window_sequences(plan.seq_len))
    return needed is not None and count_sequences(stream.tokens, plan.seq_len) >= needed


class BatchLoader:
    """An endless stream of one rank's micro-batches from a position on.

    A thread reads a few batches ahead and sends them on their way to the device (data/transfer.py). `wait_s` adds up
    the time that training stood waiting for the thread, `taken` counts batches, and `delivered` adds up the hashes of
    their samples (data/receipt.py). Use it in a `with` block, which ends the thread.
    """

    AHEAD = 4
    LOOK_EVERY_S = 0.3
    """At a data set that is still being made, while waiting for it."""

    def __init__(
        self, stream: TokenStream, plan: BatchPlan, position: DataPosition, rank: int, device: torch.device
    ) -> None:
        self.wait_s = 0.0
        self.digest_sums = np.zeros(LANES, dtype=np.int64)
        self.batches_taken = 0
        self._stream, self._plan, self._position, self._rank = stream, plan, position, rank
        self._transfer = make_transfer(device)
        self._queue: queue.Queue[tuple[Any, np.ndarray] | BaseException] = queue.Queue(maxsize=self.AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)

    def __enter__(self) -> "BatchLoader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def next_batch(self) -> Batch:
        """The next micro-batch on the device.

        Raises:
            whatever the thread met while reading; so does every later call.
        """
        started = time.perf_counter()
        item = self._queue.get()
        self.wait_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended, and nothing else will come
            raise item
        sent, sums = item
        self.batches_taken += 1
        self.digest_sums += sums
        return self._transfer.receive(sent)

    def _fill(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
        except BaseException as error:  # carried to the thread that can do something about it
            self._put(error)

    def _put(self, item: tuple[Any, np.ndarray] | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self) -> Iterator[tuple[Any, np.ndarray]]:
        stream, plan, position = self._stream, self._plan, self._position
        while True:
            while not has_step(stream, position, plan):
                if self._stopped.wait(self.LOOK_EVERY_S):
                    return
                stream.refresh()
            complete = stream.complete  # before counting: a stream may grow between the two, but never shrinks
            n_sequences = count_sequences(stream.tokens, plan.seq_len)
            step = step_sequences(position, plan.sequences, n_sequences, window_sequences(plan.seq_len))
            stream.check(step * plan.seq_len, plan.seq_len + 1)  # of all ranks, so that they all say no at one step
            places = position.epoch * n_sequences + position.index + np.arange(plan.sequences)  # among all of the run
            position = position.advance(plan.sequences, n_sequences if complete else None)
            for micro_step in range(plan.grad_accum_steps):
                mine = rank_rows(micro_step, self._rank, plan.world_size, plan.micro_batch_size)
                rows = read_rows(stream, step[mine], plan.seq_len)
                yield self._transfer.send(rows), hash_samples(places[mine], step[mine], rows)
