"""From a config to what a training step needs: the same for a run, its rehearsal and a benchmark."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from myllm.checkpoint.format import load_latest
from myllm.checkpoint.state import EarlyStop, TrainState
from myllm.data.dataloader import BatchLoader
from myllm.data.dataset import Dataset
from myllm.data.sampler import DataPosition
from myllm.distributed.parallelize import shard
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW
from myllm.planning.batch import BatchPlan
from myllm.runs.run_dir import check_has_imported_weights

from .context import RunContext
from .gradient_guard import GradientGuard
from .kernels import fast_kernels
from .restore import restore


@dataclass(frozen=True)
class Trainer:
    """The parts that take training steps."""

    ctx: RunContext
    batch: BatchPlan
    model: Transformer
    """Its parameters are what the optimizer updates; with FSDP, this rank's shards of them."""
    eval_model: Transformer
    """Neither wrapped nor compiled. With FSDP it has weights only inside `parallelize.gathered`."""
    train_model: nn.Module
    """`model`, wrapped for several ranks and compiled."""
    optimizer: ScheduledAdamW
    loader: BatchLoader
    guard: GradientGuard


@contextmanager
def build(ctx: RunContext, dataset: Dataset, batch: BatchPlan) -> Iterator[tuple[Trainer, TrainState]]:
    """Model, optimizer and data at the newest intact checkpoint in the run's folder, or at step 0 if there is none.

    The kernels are chosen for the whole process, and the loader's thread runs, until the `with` block ends.

    Raises:
        UserError: the checkpoint belongs to other settings or data, or no checkpoint is intact.
    """
    config, dist = ctx.config, ctx.dist
    model = Transformer(config.model, config.train.seed).to(dist.device)
    eval_model = shard(model, config, dist)
    optimizer = ScheduledAdamW(model.named_parameters(), config.optim, config.train.max_steps)
    torch.manual_seed(config.train.seed + dist.rank)  # dropout differs between ranks
    state = TrainState(0, 0, DataPosition(0, 0, config.train.seed, dataset.fingerprint))
    if saved := load_latest(ctx.paths.checkpoints, ctx.log):
        state = restore(saved, config, dataset, model, optimizer, dist, ctx.log)
    else:
        check_has_imported_weights(ctx.paths)
    patience = config.train.early_stop_patience
    state = replace(state, early_stop=(state.early_stop or EarlyStop()) if patience else None)
    with ExitStack() as stack:
        train_model = stack.enter_context(fast_kernels(model, config, dist, ctx.log))
        loader = stack.enter_context(BatchLoader(dataset.train, batch, state.data, dist.rank, dist.device))
        guard = GradientGuard(config.train, dist.device, state.skips)
        yield Trainer(ctx, batch, model, eval_model, train_model, optimizer, loader, guard), state
