"""Resume a run from a checkpoint."""

from dataclasses import replace

import torch

from myllm.checkpoint.dcp import read_into, strip_wrapper_prefixes, tensor_names
from myllm.checkpoint.format import Checkpoint, flatten_moments
from myllm.checkpoint.layout import OPTIMIZER, WEIGHTS
from myllm.checkpoint.rng import set_rng_state
from myllm.checkpoint.state import NO_DATASET, TrainState
from myllm.config import RunConfig, saved_config
from myllm.data.dataset import Dataset
from myllm.data.sample_digest import SampleDigest
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW
from myllm.optim.lr_schedule import learning_rate
from myllm.runs.run_dir import check_resumable

from .context import RunContext

RATE_JUMP = 1.25
"""A learning rate that changes by more than this factor between two steps is reported."""


def restore(
    saved: Checkpoint, ctx: RunContext, dataset: Dataset, model: Transformer, optimizer: ScheduledAdamW
) -> TrainState:
    """Load a checkpoint into model and optimizer, and restore this rank's random state.

    Raises:
        UserError: it was made with another model or other data.
    """
    config, dist = ctx.config, ctx.dist
    imported = saved.state.data.dataset_hash == NO_DATASET
    changed = check_resumable(saved.config, config, saved.folder, imported)
    if not imported and saved.state.data.dataset_hash != dataset.fingerprint:
        raise UserError(
            f"the checkpoint {saved.folder} was trained on other data than {dataset.folder}; use the old data set with "
            "--data.dataset NAME, start a second run with another --name, or start over with --train.fresh"
        )
    read_into(saved.folder / WEIGHTS, strip_wrapper_prefixes(model.state_dict().items()))
    if tensor_names(saved.folder / OPTIMIZER):  # imported weights have no moments
        blank = optimizer.zero_state()
        moments = strip_wrapper_prefixes(flatten_moments(blank).items())
        read_into(saved.folder / OPTIMIZER, moments)
        optimizer.load_state_dict(blank)
    if len(saved.random) == dist.world_size:
        set_rng_state(saved.random[dist.rank], dist.device)
    else:  # another number of ranks: continue from a seed that no other step has used
        torch.manual_seed(config.train.seed + dist.rank + saved.state.step * dist.world_size)
    ctx.log(f"resuming from {saved.folder} at step {saved.state.step:,}")
    for line in changed:
        ctx.log(f"  changed since then: {line}")
    earlier = saved_config(saved.config, saved.folder / "config.json")
    if not imported and (note := describe_lr_jump(saved.state.step, earlier, config)):
        ctx.log(f"  {note}")
    state = saved.state
    if imported:
        state = replace(state, data=DataPosition(0, 0, config.train.seed, dataset.fingerprint))
    return replace(state, sample_digest=state.sample_digest or SampleDigest(since_step=state.step))


def describe_lr_jump(step: int, earlier: RunConfig, config: RunConfig) -> str | None:
    """A sentence if the learning rate jumps at a restart because the schedule changed; else None.

    Args:
        step: updates made so far, with the schedule of `earlier`.
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
