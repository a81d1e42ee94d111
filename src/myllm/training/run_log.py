"""Lines of the log, and environment.json, at the start and at the end of a run."""

from collections.abc import Iterator
from typing import Any

import torch

from myllm.checkpoint.layout import checkpoint_dir
from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.inspect import describe_skipped
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.distributed.cpu_threads import threads_reason
from myllm.distributed.device_info import device_name
from myllm.distributed.precision import compute_dtype, dtype_name
from myllm.errors import exit_code
from myllm.files import write_json
from myllm.planning.batch import BatchPlan
from myllm.planning.flops import n_parameters
from myllm.planning.length import decay_note, decay_start, describe_length, warmup_note
from myllm.runs.logs import environment
from myllm.runs.run_dir import truncate_logs, write_config

from .setup import RunContext, Trainer, check_data
from .stop_signals import describe_stop


def out_of_patience(state: TrainState, config: RunConfig) -> bool:
    """True if early stopping ends the run here, before train.max_steps."""
    train, early_stop = config.train, state.early_stop
    return early_stop is not None and early_stop.exhausted(train.early_stop_patience) and state.step < train.max_steps


def record_start(trainer: Trainer, state: TrainState) -> None:
    """Drop rows of steps that will run again, write config.json and environment.json, and log what the run will do."""
    ctx = trainer.ctx
    if ctx.dist.is_rank_zero:
        truncate_logs(ctx.paths, state.step)
        write_config(ctx.paths, ctx.config)
    write_environment(ctx, trainer.dataset)
    log_start(ctx, trainer.dataset, trainer.batch, state)


def write_environment(ctx: RunContext, dataset: Dataset) -> None:
    """environment.json: the machine, the versions, the data."""
    if not ctx.dist.is_rank_zero:
        return
    details: dict[str, Any] = {
        "parameters": n_parameters(ctx.config.model),
        "dataset": dataset.name,
        "dataset_hash": dataset.fingerprint,
        "source": dataset.manifest["source"],
        "tokenizer": dataset.manifest["tokenizer"],
        "train_tokens": dataset.known_train_tokens,
        "val_tokens": dataset.val.tokens,
        "precision": dtype_name(compute_dtype(ctx.config.train.precision, ctx.dist.device)),
    }
    if isinstance(dataset, MixedDataset):
        details |= {"val_tokens": sum(component.val.tokens for component in dataset.components)}
        details |= {"components": dataset.describe_components()}
    write_json(ctx.paths.environment, environment(ctx.dist.device, ctx.dist.world_size) | details)


def record_complete_data(trainer: Trainer) -> None:
    """Check and log the length of a data set whose preparation ended during training.

    Raises:
        UserError: it has too few tokens for one step.
    """
    ctx, dataset = trainer.ctx, trainer.dataset
    check_data(ctx.config, dataset, trainer.batch)
    try:
        write_environment(ctx, dataset)
    except OSError as error:
        ctx.log(f"cannot write {ctx.paths.environment}: {error.strerror}; training continues")
    for line in ("now complete", *describe_length(ctx.config, dataset.train.tokens), *skipped_lines(dataset)):
        ctx.log(f"data: {line}")


def skipped_lines(dataset: Dataset) -> Iterator[str]:
    """What the preparation skipped or changed, with a warning where there was no text in the column."""
    components = dataset.components if isinstance(dataset, MixedDataset) else (dataset,)
    for component in components:
        for count, reason in describe_skipped(component) if component.complete else ():
            warning = "warning: " if reason.startswith("no text") else ""
            yield f"{warning}{component.name}: {count:,} x {reason}"


def log_start(ctx: RunContext, dataset: Dataset, batch: BatchPlan, state: TrainState) -> None:
    config, dist, log, max_steps = ctx.config, ctx.dist, ctx.log, ctx.config.train.max_steps
    log(f"run {config.name} on {dist.world_size} x {device_name(dist.device)} ({dist.device.type})")
    log(f"CPU threads: {torch.get_num_threads()} per process, {threads_reason()}")
    log(f"model: {n_parameters(config.model):,} parameters; batch: {batch}")
    if isinstance(dataset, MixedDataset):
        lines = [dataset.name, *dataset.describe_length(config)]
    elif dataset.known_train_tokens:
        lines = [dataset.name, *describe_length(config, dataset.known_train_tokens)]
    else:
        lines = [f"{dataset.name}, {dataset.describe_progress()}; preparation continues during training"]
    for line in (*lines, *(skipped_lines(dataset) if state.step == 0 else ())):
        log(f"data: {line}")
    before_decay = state.step <= decay_start(config.optim, max_steps)
    for note in (warmup_note(config), decay_note(config) if before_decay else None):
        if note:
            log(note)
    if out_of_patience(state, config):
        log("nothing left to train: the run has stopped early")
    elif state.step >= max_steps:
        log(f"nothing left to train: the run is at step {state.step:,}, train.max_steps is {max_steps:,}")
    else:
        log(f"steps {state.step:,} to {max_steps:,}; Ctrl-C saves and stops, the same command resumes")


def log_best(ctx: RunContext, state: TrainState) -> None:
    """Where early stopping kept the best checkpoint and, if it ended the run, how to continue."""
    early_stop, train = state.early_stop, ctx.config.train
    if not early_stop:
        return
    best = checkpoint_dir(ctx.paths.best, early_stop.best_step or 0)
    ctx.log(f"{early_stop}" + (f"; kept in {best}" if best.is_dir() else ""))
    if out_of_patience(state, ctx.config):
        ctx.log(
            f"stopped early after step {state.step:,} of {train.max_steps:,}: train.early_stop_patience is "
            f"{train.early_stop_patience}. To continue training, run the same command with a larger "
            "--train.early-stop-patience, or with None"
        )


def describe_end(config: RunConfig, step: int, stopped_by: int | None, early: bool) -> tuple[str, int]:
    """How the run ended, in words and as an exit code."""
    if stopped_by is None:
        return f"{'stopped early' if early else 'complete'}, after step {step:,}", 0
    reason = describe_stop(stopped_by, config.train.max_wall_s)
    return f"stopped by {reason} after step {step:,}{', saved' if step else ''}", exit_code(stopped_by)
