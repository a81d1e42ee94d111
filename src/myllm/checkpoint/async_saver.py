"""Saving beside training: a step waits for a copy to host memory; a thread does the rest."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from torch import Tensor

from myllm.config import RunConfig, to_dict
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.errors import TrainingDiverged
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW
from myllm.paths import RunPaths

from .dcp import copy_to_host, local_tensor, rank_tensors, strip_wrapper_prefixes
from .format import Snapshot, flatten_moments, write_checkpoint
from .integrity import OPTIMIZER, WEIGHTS
from .retention import RetentionPolicy, check_space_for_run, check_space_for_save
from .rng import get_rng_state
from .state import TrainState


class AsyncSaver:
    """Writes a run's checkpoints, one at a time, from all ranks, in the background.

    All of its methods are called by all ranks together, and what they raise is the same on all ranks. As a context, it
    waits at the end for what is being written.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunPaths,
        model: Transformer,
        optimizer: ScheduledAdamW,
        tokenizer: Tokenizer,
        process: DistContext,
    ) -> None:
        self._config, self._run, self._process = config, run, process
        self._model, self._optimizer = model, optimizer
        self._tokenizer_file = None if tokenizer.is_default else tokenizer.file
        self._group = distributed.new_background_group()
        self._copies: dict[tuple[str, str], Tensor] = {}
        """Of the save before: host memory for the next one."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._writing: int | None = None
        self.written_step: int | None = None
        """Of the newest checkpoint that this run has written, once it is whole; best/ aside."""
        self.slowest_s: float | None = None
        """The longest that a save took, from its beginning until it was whole."""

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, KeyboardInterrupt) and self._thread:  # that one leaves at once
            self._thread.join()

    def check_room(self, step: int) -> None:
        """
        Raises:
            UserError: the checkpoints that the run will keep do not fit on the disk.
        """
        run = self._run
        self._on_main(lambda: check_space_for_run(self._config, run.checkpoints, run.best, step))

    def save(self, state: TrainState, best: bool = False) -> None:
        """Begin a checkpoint, when the one before is whole.

        Args:
            best: into the run's best/, alone there; else into checkpoints/, where `train.keep_last` and
                `train.keep_every_steps` say which older ones stay.

        Raises:
            TrainingDiverged: a weight or a moment is not finite; such a checkpoint would poison every resume.
            UserError: no room on the disk, for this one or the one before.
        """
        self.wait()
        self._began = time.monotonic()
        tensors = {(WEIGHTS, name): each for name, each in self._weights().items()}
        moments = strip_wrapper_prefixes(flatten_moments(self._optimizer.state_dict()).items())
        tensors |= {(OPTIMIZER, name): each for name, each in moments.items()}
        mine = rank_tensors(tensors, self._process.rank, self._process.world_size)
        _check_finite(mine, state.step)
        folder = self._run.best if best else self._run.checkpoints
        need = sum(each.numel() * each.element_size() for each in tensors.values())
        self._on_main(lambda: check_space_for_save(folder, state.step, need))
        copies = self._copies = copy_to_host(mine, self._copies)
        snapshot = Snapshot(
            state,
            to_dict(self._config),
            {name: each for (part, name), each in copies.items() if part == WEIGHTS},
            {name: each for (part, name), each in copies.items() if part == OPTIMIZER},
            {self._process.rank: get_rng_state(self._process.device)},
            self._tokenizer_file,
        )
        train = self._config.train
        keep = RetentionPolicy(alone=True) if best else RetentionPolicy(train.keep_last, train.keep_every_steps)
        self._writing = None if best else state.step
        self._thread = threading.Thread(target=self._write, args=(folder, snapshot, keep), daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a save has failed; `fail` on all ranks says how."""
        return self._failure is not None

    def fail(self) -> NoReturn:
        """End the run on all ranks, once one of them says that a save has `failed`.

        Raises:
            UserError: no room on the disk.
        """
        self.wait()
        raise RuntimeError("a checkpoint could not be written; another rank says why")

    def wait(self) -> None:
        """Until what is being written is whole.

        Raises:
            UserError: no room on the disk.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def _write(self, folder: Path, snapshot: Snapshot, keep: RetentionPolicy) -> None:
        try:
            write_checkpoint(folder, snapshot, keep, self._group)
            self.written_step = self.written_step if self._writing is None else self._writing
            self.slowest_s = max(time.monotonic() - self._began, self.slowest_s or 0.0)
        except BaseException as error:
            self._failure = error

    def _weights(self) -> dict[str, Tensor]:
        return strip_wrapper_prefixes(self._model.state_dict().items())

    def _on_main(self, check: Callable[[], None]) -> None:
        distributed.run_on_all_ranks(check if self._process.is_rank_zero else lambda: None)


def _check_finite(tensors: dict[tuple[str, str], Tensor], step: int) -> None:
    """With one read from the device."""
    # One number that is not finite makes the sum so, and a sum is several times as fast as looking at each. Where huge
    # numbers overflow it, each is looked at.
    sums = [local_tensor(tensor).sum() for tensor in tensors.values()]
    flags = torch.stack([each.to(sums[0].device) for each in sums]).isfinite().tolist() if sums else []
    doubtful = [key for key, fine in zip(tensors, flags, strict=True) if not fine]
    bad = [key[1] for key in doubtful if not local_tensor(tensors[key]).isfinite().all()]
    if distributed.all_reduce_any(bool(bad))[0]:
        names = sorted({name for names in distributed.all_gather_object(bad) for name in names})
        raise TrainingDiverged(
            f"after step {step:,} the weights {', '.join(names[:3])} are not finite and were not saved. Start "
            "the same command again to go back to the newest checkpoint, with a lower optim.max_lr"
        )
