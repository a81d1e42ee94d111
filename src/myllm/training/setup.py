"""Build what a training step needs, new or from a checkpoint: model, optimizer, data and dropout's random state."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from myllm.checkpoint.dcp import read_moments, read_weights
from myllm.checkpoint.early_stop import EarlyStop
from myllm.checkpoint.format import Checkpoint, load_latest
from myllm.checkpoint.rng import set_rng_state
from myllm.checkpoint.state import NO_DATASET, TrainState
from myllm.config import DataConfig, RunConfig, saved_config
from myllm.data.dataloader import BatchLoader
from myllm.data.dataset import Dataset
from myllm.data.inspect import held_out_prompts
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.sample_digest import SampleDigest
from myllm.data.sampler import DataPosition, count_sequences
from myllm.data.settings import settings_of
from myllm.data.tokenizer.load import load_tokenizer, trained_vocab_size
from myllm.distributed.collectives import DistContext, all_ranks
from myllm.distributed.parallelize import shard
from myllm.errors import UserError
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.paths import RunPaths
from myllm.planning.batch import BatchPlan, batch_plan
from myllm.planning.length import resolve_max_steps
from myllm.planning.own_text import fitting_options
from myllm.runs.logs import JsonlFile, Log
from myllm.runs.run_dir import check_new_weights, imported_weights_error
from myllm.runs.saved_settings import check_resumable

from .gradient_guard import GradientGuard
from .kernels import fast_kernels
from .schedule_change import check_schedule_change, describe_schedule_change


@dataclass(frozen=True)
class RunContext:
    """Created once per run. A function that needs only one of these takes that one."""

    config: RunConfig
    dist: DistContext
    paths: RunPaths
    log: Callable[[str], None]
    metrics: JsonlFile
    samples: JsonlFile
    started: float
    """When this process began, by the monotonic clock. `train.max_wall_s` counts from here."""

    @classmethod
    def create(
        cls,
        config: RunConfig,
        dist: DistContext,
        paths: RunPaths | None = None,
        log: Callable[[str], None] | None = None,
        started: float | None = None,
    ) -> "RunContext":
        """Creates no file: each appears with its first line.

        Args:
            paths: None: the folder of the run that the config names.
            log: None: log.txt in that folder, and the terminal.
            started: None: now.
        """
        paths = paths or RunPaths.of(config.name)
        log = log or Log(paths.log, dist.is_rank_zero)
        metrics, samples = JsonlFile(paths.metrics, log), JsonlFile(paths.samples, log)
        return cls(config, dist, paths, log, metrics, samples, time.monotonic() if started is None else started)


@dataclass(frozen=True)
class Trainer:
    """The parts that take training steps."""

    ctx: RunContext
    dataset: Dataset
    batch: BatchPlan
    model: Transformer
    """Its parameters are what the optimizer updates; with FSDP, this rank's shards of them."""
    eval_model: Transformer
    """Neither wrapped nor compiled. With FSDP it has weights only inside `parallelize.full_params`."""
    train_model: nn.Module
    """`model`, wrapped for several ranks and compiled."""
    optimizer: ScheduledOptimizer
    loader: BatchLoader
    guard: GradientGuard


@contextmanager
def build(ctx: RunContext, dataset: Dataset, batch: BatchPlan | None = None) -> Iterator[tuple[Trainer, TrainState]]:
    """Model, optimizer and data at the newest intact checkpoint in the run's folder, or at step 0 if there is none.

    Until the `with` block ends, the loader's thread runs and the choice of kernels holds for the whole process.

    Args:
        batch: None: as the config says.

    Raises:
        UserError: the checkpoint was made with other settings or data, or no checkpoint is intact.
    """
    config, dist = ctx.config, ctx.dist
    batch = batch or batch_plan(config, dist.world_size)
    model = Transformer(config.model, config.train.seed).to(dist.device)
    eval_model = shard(model, config, dist)
    optimizer = ScheduledOptimizer(
        model.named_parameters(), model.hidden_matrices(), config.optim, config.train.max_steps, all_ranks()
    )
    torch.manual_seed(config.train.seed + dist.rank)  # dropout differs between ranks
    state = TrainState(0, 0, DataPosition(0, 0, config.train.seed, dataset.fingerprint))
    if saved := load_latest(ctx.paths.checkpoints, ctx.log):
        state = restore(saved, ctx, dataset, model, optimizer)
    elif config.init.source is not None:
        from myllm.inference.initial_weights import load_initial_weights  # loads the Hub's code

        load_initial_weights(config, ctx.paths, dataset, model, optimizer, ctx.log)
    else:
        check_new_weights(ctx.paths)
    patience = config.train.early_stop_patience
    state = replace(state, early_stop=(state.early_stop or EarlyStop()) if patience else None)
    with ExitStack() as stack:
        model.keep_token_losses = isinstance(dataset, MixedDataset)
        train_model = stack.enter_context(fast_kernels(model, config, dist, ctx.log))
        loader = stack.enter_context(BatchLoader(dataset.order(batch), batch, state.data, dist.rank, dist.device))
        guard = GradientGuard(config.train, dist.device, state.skips)
        yield Trainer(ctx, dataset, batch, model, eval_model, train_model, optimizer, loader, guard), state


def resolve_config(config: RunConfig, dataset: Dataset, dist: DistContext) -> RunConfig:
    """The config with the steps that `train.epochs` means for this data set, the settings that made it, and prompts.

    Raises:
        UserError: as `check_data`; or `train.epochs` is set and nobody knows yet how many tokens there will be.
    """
    if isinstance(dataset, MixedDataset):
        assert config.train.epochs is None  # refused with the command
    elif dataset.known_train_tokens:
        config = resolve_max_steps(config, dataset.known_train_tokens)
    elif config.train.epochs is not None:
        raise UserError(
            f"train.epochs needs all of the data set {dataset.name}, which is still being prepared; prepare it first"
        )
    check_data(config, dataset, batch_plan(config, dist.world_size))
    evals = replace(config.eval, sample_prompts=config.eval.sample_prompts or held_out_prompts(dataset))
    return replace(config, data=settings_of(dataset, config.data), eval=evals)


def check_data(config: RunConfig, dataset: Dataset, batch: BatchPlan) -> None:
    """
    Raises:
        UserError: too few tokens for one step or for one validation sequence, a tokenizer that does not match the
            config, or a damaged validation shard. The loader checks training shards when it first reads them.
    """
    if isinstance(dataset, MixedDataset):  # small ones may have less than a step's tokens
        dataset.check_epochs(config)
        for component in dataset.components:
            _check_held_out(config, component, batch)
    else:
        _check_held_out(config, dataset, batch)
        _check_length(config, dataset, batch)
    _check_vocabulary(config, dataset)


def _check_held_out(config: RunConfig, dataset: Dataset, batch: BatchPlan) -> None:
    dataset.val.verify(np.zeros(1, dtype=np.int64), dataset.val.tokens)
    if config.eval.validation_every_steps and dataset.val.tokens < batch.seq_len + 1:
        # At most a tenth of the source is held out: a higher data.val_tokens helps only below that.
        more = "raise data.val_tokens, " if dataset.val.tokens >= config.data.val_tokens else ""
        raise UserError(
            f"the data set {dataset.name} holds out {dataset.val.tokens:,} tokens, too few for one sequence of "
            f"model.max_seq_len {batch.seq_len:,} and its last target; add text, {more}lower model.max_seq_len, or set "
            "eval.validation_every_steps to 0"
        )


def _check_length(config: RunConfig, dataset: Dataset, batch: BatchPlan) -> None:
    n_sequences = count_sequences(dataset.train.tokens, batch.seq_len)
    if dataset.known_train_tokens and n_sequences < batch.sequences:
        options = fitting_options(config, dataset.train.tokens)
        raise UserError(
            f"the data set {dataset.name} has {dataset.train.tokens:,} training tokens, {n_sequences:,} sequences of "
            f"{batch.seq_len:,}, fewer than the {batch.sequences:,} of one step; add text, or lower train.batch_tokens"
            f": {options or 'no batch is small enough, so lower model.max_seq_len too'}"
        )


def _check_vocabulary(config: RunConfig, dataset: Dataset) -> None:
    tokenizer = dataset.manifest["tokenizer"]
    if config.data.tokenizer != DataConfig.tokenizer and not trained_vocab_size(config.data.tokenizer):
        requested = load_tokenizer(config.data.tokenizer)
        if requested.sha256 != tokenizer["sha256"]:
            raise UserError(
                f"the data set {dataset.name} was made with the tokenizer {tokenizer['name']}, but data.tokenizer is "
                f"{requested.name}; prepare data with that one, or remove data.tokenizer"
            )
    vocab_size = tokenizer["vocab_size"]
    if config.model.vocab_size != vocab_size:
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size:,}, but the tokenizer of {dataset.name} has {vocab_size:,} "
            f"tokens; set it to {vocab_size} (to pad the embedding for speed, use model.vocab_multiple)"
        )


def restore(
    saved: Checkpoint, ctx: RunContext, dataset: Dataset, model: Transformer, optimizer: ScheduledOptimizer
) -> TrainState:
    """Load a checkpoint into model and optimizer, and restore this rank's random state.

    Raises:
        UserError: it was made with another model or other data, or wsd's decay has begun and would be undone.
    """
    config, dist = ctx.config, ctx.dist
    if saved.state.data.dataset_hash == NO_DATASET:
        raise imported_weights_error(ctx.paths)
    changed = check_resumable(saved.config, config, saved.folder)
    earlier = saved_config(saved.config, saved.folder / "config.json")
    check_schedule_change(saved.state.step, earlier, config)
    if saved.state.data.dataset_hash != dataset.fingerprint:
        raise UserError(
            f"the checkpoint {saved.folder} was trained on other data than {dataset.name}; use the old data set with "
            "--data.dataset NAME, start a second run with another --name, or start over with --train.fresh"
        )
    read_weights(saved.folder, model)
    read_moments(saved.folder, optimizer)
    if len(saved.random) == dist.world_size:
        set_rng_state(saved.random[dist.rank], dist.device)
    else:  # another number of ranks: continue from a seed that no other step has used
        torch.manual_seed(config.train.seed + dist.rank + saved.state.step * dist.world_size)
    ctx.log(f"resuming from {saved.folder} at step {saved.state.step:,}")
    for line in changed:
        ctx.log(f"  changed since then: {line}")
    if note := describe_schedule_change(saved.state.step, earlier, config):
        ctx.log(f"  {note}")
    return replace(saved.state, sample_digest=saved.state.sample_digest or SampleDigest(since_step=saved.state.step))
