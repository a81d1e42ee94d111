"""From a run to its checkpoint and back."""

from dataclasses import replace
from pathlib import Path

import torch

from . import checkpoint, distributed
from .checkpoint import TrainState
from .config import RunConfig, to_dict
from .data.order import DataPosition
from .data.receipt import Receipt
from .data.shards import Dataset
from .data.tokenizer import Tokenizer
from .distributed import Process
from .errors import UserError
from .meter import Diverged
from .metrics import Log
from .model import Transformer
from .optim import ScheduledAdamW
from .run_folder import check_resumable


def save_due(config: RunConfig, step: int, ending: bool) -> bool:
    every = config.train.save_every_steps
    return step > 0 and (ending or (every > 0 and step % every == 0))


def save(
    folder: Path,
    state: TrainState,
    config: RunConfig,
    model: Transformer,
    optimizer: ScheduledAdamW,
    tokenizer: Tokenizer,
    process: Process,
    alone: bool = False,
) -> None:
    """Write a checkpoint into `folder` on rank 0; every rank learns whether that worked.

    Args:
        alone: afterwards nothing but the new one is kept there; else the newest `train.keep_last`.

    Raises:
        Diverged: a weight is not finite; such a checkpoint would poison every resume.
        UserError: no room on the disk.
    """
    bad = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if bad:
        raise Diverged(
            f"after step {state.step:,} the weights {', '.join(bad[:3])} are not finite and were not saved. Start "
            "the same command again to go back to the newest checkpoint, with a lower optim.max_lr"
        )
    random = distributed.gather_to_main(checkpoint.random_state(process.device))
    failure: UserError | None = None
    if process.is_main:
        try:
            written = checkpoint.save(
                folder, state, to_dict(config), model.state_dict(), optimizer.state_dict(), random,
                0 if alone else config.train.keep_last, None if tokenizer.is_default else tokenizer.file,
            )  # fmt: skip
            if alone:
                checkpoint.remove_others(written)
        except UserError as error:
            failure = error
    failure = distributed.from_main(failure)
    if failure:
        raise failure


def restore(
    saved: checkpoint.Checkpoint,
    config: RunConfig,
    dataset: Dataset,
    model: Transformer,
    optimizer: ScheduledAdamW,
    process: Process,
    log: Log,
) -> TrainState:
    """Load a checkpoint into model and optimizer and take its place in the data.

    Raises:
        UserError: it was made with another model or other data.
    """
    imported = saved.state.data.dataset_hash == checkpoint.UNBOUND
    changed = check_resumable(saved.config, config, saved.folder, imported)
    if not imported and saved.state.data.dataset_hash != dataset.hash:
        raise UserError(
            f"the checkpoint {saved.folder} was trained on other data than {dataset.folder}; give the old data set "
            "with --data.dataset NAME, another --name to start a second run, or --train.fresh to start over"
        )
    model.load_state_dict(saved.model)
    optimizer.load_state_dict(saved.optimizer)
    if len(saved.random) == process.world_size:
        checkpoint.restore_random_state(saved.random[process.rank], process.device)
    else:  # dropout of other ranks is nobody's: start anew from something that no other step has used
        torch.manual_seed(config.train.seed + process.rank + saved.state.step * process.world_size)
    log(f"resuming from {saved.folder} at step {saved.state.step:,}")
    for line in changed:
        log(f"  changed since then: {line}")
    state = saved.state
    if imported:
        state = replace(state, data=DataPosition(0, 0, config.train.seed, dataset.hash))
    return replace(state, receipt=state.receipt or Receipt(since_step=state.step))
