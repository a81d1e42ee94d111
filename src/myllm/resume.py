"""From a checkpoint back to a run."""

from dataclasses import replace

import torch

from . import checkpoint, sharded
from .checkpoint import TrainState
from .config import RunConfig
from .data.order import DataPosition
from .data.receipt import Receipt
from .data.shards import Dataset
from .distributed import Process
from .errors import UserError
from .metrics import Log
from .model import Transformer
from .optim import ScheduledAdamW
from .run_folder import check_resumable


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
    sharded.read_into(saved.folder / checkpoint.WEIGHTS, sharded.plain_names(model.state_dict().items()))
    if sharded.names_in(saved.folder / checkpoint.OPTIMIZER):  # none: imported weights
        blank = optimizer.blank_state()
        moments = sharded.plain_names(checkpoint.by_name(blank).items())
        sharded.read_into(saved.folder / checkpoint.OPTIMIZER, moments)
        optimizer.load_state_dict(blank)
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
