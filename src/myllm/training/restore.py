"""From a checkpoint back to a run."""

from dataclasses import replace

import torch

from myllm.checkpoint.dcp import read_into, strip_wrapper_prefixes, tensor_names
from myllm.checkpoint.format import Checkpoint, flatten_moments
from myllm.checkpoint.integrity import OPTIMIZER, WEIGHTS
from myllm.checkpoint.rng import set_rng_state
from myllm.checkpoint.state import NO_DATASET, TrainState
from myllm.config import RunConfig, saved_config
from myllm.data.dataset import Dataset
from myllm.data.sample_digest import SampleDigest
from myllm.data.sampler import DataPosition
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW
from myllm.optim.lr_schedule import learning_rate
from myllm.runs.logs import Log
from myllm.runs.run_dir import check_resumable

RATE_JUMP = 1.25
"""A change of the rate by this factor from one step to the next is said."""


def restore(
    saved: Checkpoint,
    config: RunConfig,
    dataset: Dataset,
    model: Transformer,
    optimizer: ScheduledAdamW,
    process: DistContext,
    log: Log,
) -> TrainState:
    """Load a checkpoint into model and optimizer and take its place in the data.

    Raises:
        UserError: it was made with another model or other data.
    """
    imported = saved.state.data.dataset_hash == NO_DATASET
    changed = check_resumable(saved.config, config, saved.folder, imported)
    if not imported and saved.state.data.dataset_hash != dataset.fingerprint:
        raise UserError(
            f"the checkpoint {saved.folder} was trained on other data than {dataset.folder}; give the old data set "
            "with --data.dataset NAME, another --name to start a second run, or --train.fresh to start over"
        )
    read_into(saved.folder / WEIGHTS, strip_wrapper_prefixes(model.state_dict().items()))
    if tensor_names(saved.folder / OPTIMIZER):  # none: imported weights
        blank = optimizer.zero_state()
        moments = strip_wrapper_prefixes(flatten_moments(blank).items())
        read_into(saved.folder / OPTIMIZER, moments)
        optimizer.load_state_dict(blank)
    if len(saved.random) == process.world_size:
        set_rng_state(saved.random[process.rank], process.device)
    else:  # dropout of other ranks is nobody's: start anew from something that no other step has used
        torch.manual_seed(config.train.seed + process.rank + saved.state.step * process.world_size)
    log(f"resuming from {saved.folder} at step {saved.state.step:,}")
    for line in changed:
        log(f"  changed since then: {line}")
    earlier = saved_config(saved.config, saved.folder / "config.json")
    if not imported and (note := describe_lr_jump(saved.state.step, earlier, config)):
        log(f"  {note}")
    state = saved.state
    if imported:
        state = replace(state, data=DataPosition(0, 0, config.train.seed, dataset.fingerprint))
    return replace(state, sample_digest=state.sample_digest or SampleDigest(since_step=state.step))


def describe_lr_jump(step: int, earlier: RunConfig, config: RunConfig) -> str | None:
    """One sentence if the learning rate jumps at a restart, because another schedule was asked for; else None.

    Args:
        step: updates made so far, by the schedule of `earlier`.
    """
    if not 0 < step < config.train.max_steps:
        return None
    last = learning_rate(step - 1, earlier.optim, earlier.train.max_steps)
    planned = learning_rate(step, earlier.optim, earlier.train.max_steps)
    following = learning_rate(step, config.optim, config.train.max_steps)
    if following == planned or last / RATE_JUMP <= following <= last * RATE_JUMP:
        return None
    why = "optim settings have changed"
    if config.train.max_steps != earlier.train.max_steps:
        why = f"the schedule now ends at step {config.train.max_steps:,} instead of {earlier.train.max_steps:,}"
    advice = "; the loss will rise before it falls (a lower --optim.max-lr makes that smaller)"
    return (
        f"the learning rate was {last:.3g} at the last step and is {following:.3g} at the next: {why}"
        f"{advice if following > last else ''}"
    )
