"""Batches for one rank, read ahead by a background thread. The data set may still be growing: then ranks wait together.

Shapes: B micro-batch, T sequence.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch

from myllm.distributed import collectives
from myllm.errors import UserError
from myllm.planning.batch import BatchPlan

from .order import SequenceOrder
from .preparation_lock import PreparationEnded
from .sample_digest import LANES, hash_samples
from .sampler import DataPosition, rank_rows
from .transfer import Batch, inputs_and_targets, make_transfer


def read_batch(order: SequenceOrder, sequences: np.ndarray) -> Batch:
    """Sequences as inputs and targets, the targets one token ahead.

    Shapes:
        sequences (B,); returns (B, T) int64 twice
    """
    order.verify(sequences)
    return inputs_and_targets(order.read(sequences))


class BatchLoader:
    """An endless stream of one rank's micro-batches from a position on.

    Use it in a `with` block, which ends the thread:

        with BatchLoader(dataset.order(plan), plan, position, rank, device) as loader:
            while loader.wait_for_step(stop_requested, log):
                for _ in range(plan.grad_accum_steps):
                    tokens, targets = loader.next_batch()
    """

    READ_AHEAD = 4
    """Micro-batches."""
    POLL_S = 0.3
    """How often to look for new shards of a growing data set."""
    LOG_EVERY_POLLS = 100
    """Half a minute."""

    def __init__(
        self, order: SequenceOrder, plan: BatchPlan, position: DataPosition, rank: int, device: torch.device
    ) -> None:
        self.position = position
        """Behind the steps whose micro-batches have all been taken."""
        self.batches_taken = 0
        self.digest_sums = np.zeros(LANES, dtype=np.int64)
        """Sum of the hashes of all samples taken (sample_digest.py)."""
        self.wait_s = 0.0
        """Time that `next_batch` waited for the thread."""
        self._order, self._plan, self._rank = order, plan, rank
        self._complete_on_all_ranks, self._began_incomplete = False, not order.dataset.complete
        self._transfer = make_transfer(device)
        self._queue: queue.Queue[tuple[Any, np.ndarray] | BaseException] = queue.Queue(maxsize=self.READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(position,), name="loader", daemon=True)

    def __enter__(self) -> "BatchLoader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def wait_for_step(
        self,
        stop_requested: Callable[[], bool],
        log: Callable[[str], None],
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_complete: Callable[[], None] = lambda: None,
    ) -> bool:
        """Wait until every rank has the tokens of its next step. Every rank calls this before each step.

        Communicates with the other ranks until the data set is complete on all of them, and returns at once from then
        on.

        Args:
            stop_requested: asked again and again while waiting.
            log: gets a line every half minute while waiting.
            waiting: a context to wait in, for example to count the time apart. Not entered if there is no wait.
            on_complete: called on every rank when a data set that was incomplete at the start is complete.

        Returns:
            False if any rank was asked to stop.

        Raises:
            PreparationEnded: the rest of the data set will not come. Raised on all ranks.
        """
        if self._complete_on_all_ranks:
            return True
        with ExitStack() as stack:
            for poll in itertools.count():
                error = self._look_for_shards()
                missing, stopping, failed, incomplete, began_incomplete = collectives.all_reduce_any(
                    not self._has_next_step(), stop_requested(), error is not None,
                    not self._order.dataset.complete, self._began_incomplete,
                )  # fmt: skip
                if stopping:  # checked first: the signal that stops a run may have ended the preparation too
                    return False
                if failed:
                    raise error or PreparationEnded("another rank's data set cannot be completed; see its message")
                if not missing:
                    break
                if poll == 0:
                    stack.enter_context(waiting())
                if poll % self.LOG_EVERY_POLLS == 0:
                    log(f"waiting for data: {self._order.dataset.describe_progress()}")
                time.sleep(self.POLL_S)
        if not incomplete:
            self._complete_on_all_ranks = True
            if began_incomplete:
                on_complete()
        return True

    def _has_next_step(self) -> bool:
        return self._order.has(self.position, self._plan.sequences)

    def _look_for_shards(self) -> PreparationEnded | None:
        """Look for new shards if the next step lacks tokens. Returns an error if no more will come."""
        try:
            if not self._has_next_step():
                self._order.dataset.raise_if_abandoned()
        except UserError as error:
            return PreparationEnded(str(error))
        return None

    def next_batch(self) -> Batch:
        """The next micro-batch on the device.

        Raises:
            Exception: what the thread met while reading. Every later call raises it again.
        """
        started = time.perf_counter()
        item = self._queue.get()
        self.wait_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended, so nothing else will come
            raise item
        sent, sums = item
        self.batches_taken += 1
        self.digest_sums += sums
        if self.batches_taken % self._plan.grad_accum_steps == 0:
            self.position = self._order.advance(self.position, self._plan.sequences)
        return self._transfer.receive(sent)

    def _fill(self, position: DataPosition) -> None:
        try:
            for batch in self._batches(position):
                if not self._put(batch):
                    return
        except BaseException as error:  # raised again by `next_batch`
            self._put(error)

    def _put(self, item: tuple[Any, np.ndarray] | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self, position: DataPosition) -> Iterator[tuple[Any, np.ndarray]]:
        order, plan = self._order, self._plan
        while True:
            while not order.has(position, plan.sequences):
                if self._stopped.wait(self.POLL_S):
                    return
                order.dataset.refresh()
            sequences = order.take(position, plan.sequences)
            order.verify(sequences)  # those of all ranks, so that all ranks refuse a damaged shard at the same step
            sample_numbers = order.done(position) + np.arange(plan.sequences)  # counted over the whole run
            position = order.advance(position, plan.sequences)
            for micro_step in range(plan.grad_accum_steps):
                own = rank_rows(micro_step, self._rank, plan.world_size, plan.micro_batch_size)
                rows = order.read(sequences[own])
                yield self._transfer.send(rows), hash_samples(sample_numbers[own], sequences[own], rows)
