"""Asynchronous saves: training waits for a copy to host memory, and a thread writes it to the disk."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import torch
from torch import Tensor

from myllm.config import RunConfig, to_dict
from myllm.data.tokenizer.load import Tokenizer
from myllm.distributed.collectives import (
    DistContext,
    all_gather_object,
    all_reduce_any,
    new_background_group,
    run_on_all_ranks,
)
from myllm.errors import TrainingDiverged
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.optim.ranks import local
from myllm.paths import RunPaths

from .dcp import copy_to_host, flatten_moments, rank_tensors
from .format import Snapshot, write_checkpoint
from .layout import OPTIMIZER, WEIGHTS
from .retention import RetentionPolicy, check_space_for_run, check_space_for_save
from .rng import get_rng_state
from .state import TrainState


class AsyncSaver:
    """Writes the checkpoints of a run in the background, one at a time.

    All ranks call all methods together, and get the same errors. As a context manager, it waits for the last save.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunPaths,
        model: Transformer,
        optimizer: ScheduledOptimizer,
        tokenizer: Tokenizer,
        dist: DistContext,
    ) -> None:
        self._config, self._run, self._dist = config, run, dist
        self._model, self._optimizer = model, optimizer
        self._tokenizer_file = None if tokenizer.is_default else tokenizer.file
        self._group = new_background_group()
        self._buffers: dict[tuple[str, str], Tensor] = {}
        """Host memory of the previous save, to be reused."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.written_step: int | None = None
        """Step of the newest complete checkpoint of this run, best/ excluded."""
        self.slowest_s: float | None = None
        """The longest time of a save, from its start until it was complete."""

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, KeyboardInterrupt) and self._thread:  # Ctrl-C exits at once
            self._thread.join()

    def check_disk_space(self, step: int) -> None:
        """
        Raises:
            UserError: the checkpoints that the run will keep do not fit on the disk.
        """
        run = self._run
        self._on_rank_zero(lambda: check_space_for_run(self._config, run.checkpoints, run.best, step))

    def save(self, state: TrainState, best: bool = False) -> None:
        """Wait for the previous save, then start one.

        Args:
            best: save to the run's best/ and delete the previous best. Otherwise save to checkpoints/, where
                `train.keep_last` and `train.keep_every_steps` say which older ones stay.

        Raises:
            TrainingDiverged: a weight or a moment is not finite. Such a checkpoint would break every resume.
            UserError: no disk space, for this save or the previous one.
        """
        self.wait()
        started = time.monotonic()
        moments = flatten_moments(self._optimizer.state_dict())
        tensors = {(WEIGHTS, name): tensor for name, tensor in self._model.state_dict().items()}
        tensors |= {(OPTIMIZER, name): tensor for name, tensor in moments.items()}
        own = rank_tensors(tensors, self._dist.rank, self._dist.world_size)
        _check_finite(own, state.step)
        folder = self._run.best if best else self._run.checkpoints
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._on_rank_zero(lambda: check_space_for_save(folder, state.step, n_bytes))
        self._buffers = copy_to_host(own, self._buffers)
        snapshot = Snapshot(
            state,
            to_dict(self._config),
            {name: tensor for (part, name), tensor in self._buffers.items() if part == WEIGHTS},
            {name: tensor for (part, name), tensor in self._buffers.items() if part == OPTIMIZER},
            {self._dist.rank: get_rng_state(self._dist.device)},
            self._tokenizer_file,
        )
        train = self._config.train
        keep = RetentionPolicy(newest_only=True) if best else RetentionPolicy(train.keep_last, train.keep_every_steps)

        def write() -> None:
            try:
                write_checkpoint(folder, snapshot, keep, self._group)
                self.written_step = self.written_step if best else state.step
                self.slowest_s = max(time.monotonic() - started, self.slowest_s or 0.0)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """True if this rank knows that a save has failed. Then call `raise_failure` on all ranks."""
        return self._failure is not None

    def raise_failure(self) -> NoReturn:
        """
        Raises:
            UserError: no disk space.
            RuntimeError: any other error.
        """
        self.wait()
        raise RuntimeError("a checkpoint could not be written; see the error of another rank above")

    def wait(self) -> None:
        """Wait until the current save is complete.

        Raises:
            UserError: no disk space.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def _on_rank_zero(self, check: Callable[[], None]) -> None:
        run_on_all_ranks(check if self._dist.is_rank_zero else lambda: None)


def _check_finite(tensors: dict[tuple[str, str], Tensor], step: int) -> None:
    """Check all tensors with a single read from the device."""
    # A sum is not finite if any element isn't, and is several times as fast as testing each. As it may overflow,
    # tensors with such a sum are tested element by element.
    sums = [local(tensor).sum() for tensor in tensors.values()]
    flags = torch.stack([total.to(sums[0].device) for total in sums]).isfinite().tolist() if sums else []
    suspects = [key for key, finite in zip(tensors, flags, strict=True) if not finite]
    bad = [name for part, name in suspects if not local(tensors[part, name]).isfinite().all()]
    if all_reduce_any(bool(bad))[0]:
        names = sorted({name for by_rank in all_gather_object(bad) for name in by_rank})
        raise TrainingDiverged(
            f"after step {step:,} the weights {', '.join(names[:3])} are not finite and were not saved. Run the same "
            "command again, with a lower optim.max_lr, to resume from the newest checkpoint"
        )
