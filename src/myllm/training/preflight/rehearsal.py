"""The rehearsal of a run: real steps, a batch of every evaluation, a sample, a save and a load, on random tokens.

It goes through the functions that the run itself uses (setup.build, train_step, run_eval, AsyncSaver, restore), with
the run's model, optimizer, precision and ranks at full shapes, so the two cannot drift apart.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from statistics import median

from myllm.checkpoint.async_saver import AsyncSaver
from myllm.checkpoint.format import load_latest
from myllm.checkpoint.layout import list_checkpoints, step_of
from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig
from myllm.data.dataloader import BatchLoader
from myllm.data.sampler import DataPosition
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import full_params
from myllm.errors import TrainingDiverged
from myllm.evals.tasks import TASKS
from myllm.files import folder_bytes
from myllm.paths import RunPaths
from myllm.planning.batch import batch_plan
from myllm.planning.forecast import candidate_sizes
from myllm.planning.length import length_note, resolve_max_steps
from myllm.runs.heartbeat import Heartbeat
from myllm.runs.reference_curve import ReferenceWatch
from myllm.training.evaluator import StopVote, build_evals, run_eval
from myllm.training.setup import RunContext, Trainer, build, check_data, restore
from myllm.training.step import train_step
from myllm.training.stop_signals import StopRequest

from .batch_size import (
    MEMORY_ACCUM_STEPS,
    is_safe_to_try,
    largest_that_fits,
    memory_probe,
    resolve_micro_batch_size,
)
from .data_and_disk import DataAndDisk, find_prepared, inspect_data_and_disk, tokenizer_for
from .device_memory import OutOfMemory, memory_limit_bytes, run_within_memory
from .scratch import random_dataset, scratch_folder
from .summary import Limits, Measurements, PreflightResult, shorten_evals

STEPS = 3
"""Timed after a warm-up."""
LOSS_SCALE_STEPS = 20
"""Steps before a loss scale that still overflows counts as a failure; it falls from its first to its lowest in 16."""
STEPS_S = 30.0
"""If whole steps would take longer than this together, fewer are timed, or a part of one."""

Say = Callable[[str], None]


def preflight(
    config: RunConfig,
    dist: DistContext,
    limits: Limits,
    say: Say = print,
    limit_bytes: int | None = None,
    own_text: bool = False,
) -> PreflightResult:
    """Rehearse a run. The run's folder and the random state are not touched, and nothing is left behind.

    Args:
        say: called on every rank with what happens next.
        limit_bytes: memory that one rank may use; None: what is available, minus headroom.
        own_text: as for `resolve_max_steps`.

    Raises:
        UserError: the settings cannot work on any machine.
    """
    storage, steps_done, val_tokens = _inspect(config, dist)
    tokenizer = tokenizer_for(config)
    if storage.tokens:
        config = resolve_max_steps(config, storage.tokens, own_text)
    else:
        say(length_note(config, own_text) or "the size of the text is not known yet")
        config = replace(config, train=replace(config.train, epochs=None))
    limit_bytes = memory_limit_bytes(dist) if limit_bytes is None else limit_bytes
    if steps_done < config.train.max_steps:
        config, note = resolve_micro_batch_size(config, tokenizer, dist, val_tokens, limit_bytes)
        if note:
            say(note)
    result = PreflightResult(config, dist, limits, storage, limit_bytes, steps_done)
    return result if result.is_complete else _rehearse(result, tokenizer, say)


def _inspect(config: RunConfig, dist: DistContext) -> tuple[DataAndDisk, int, int | None]:
    """Data and disk, completed steps, and validation tokens if the data set is prepared, as rank 0 sees them.

    Raises:
        UserError: the text does not exist, or has too few tokens for one step; on every rank.
    """

    def inspect() -> tuple[DataAndDisk, int, int | None] | None:
        if not dist.is_rank_zero:
            return None
        storage, dataset = inspect_data_and_disk(config), find_prepared(config.data)
        checkpoints = [] if config.train.fresh else list_checkpoints(RunPaths.of(config.name).checkpoints)
        steps_done = step_of(checkpoints[0]) if checkpoints else 0
        if dataset is None or not dataset.known_train_tokens:
            return storage, steps_done, None
        check_data(config, dataset, batch_plan(config, dist.world_size))
        return storage, steps_done, dataset.val.tokens

    inspected = distributed.run_on_all_ranks(inspect)[0]
    assert inspected is not None  # by rank 0
    return inspected


def _rehearse(result: PreflightResult, tokenizer: Tokenizer, say: Say) -> PreflightResult:
    config, dist, limit_bytes = result.config, result.dist, result.limit_bytes
    batch = batch_plan(config, dist.world_size)
    size, short = batch.micro_batch_size, batch.with_max_accum_steps(MEMORY_ACCUM_STEPS)
    with scratch_folder(dist) as folder:
        dataset = random_dataset(config, folder, tokenizer, dist)
        check_data(config, dataset, batch)
        ctx = RunContext.create(config, dist, RunPaths(folder / "run"), log=lambda line: None)

        def measure() -> Measurements:
            with build(ctx, dataset, short) as (trainer, _):
                return _measure(trainer, tokenizer, result.has_space_to_save, say)

        try:
            if not is_safe_to_try(config, dist, size, limit_bytes):
                raise OutOfMemory
            measured, peak = run_within_memory(measure, dist, limit_bytes)
            return replace(result, measured=replace(measured, peak_bytes=peak))
        except OutOfMemory:
            pass
        say(f"out of memory with train.micro_batch_size {size}; looking for one that fits")
        candidates = candidate_sizes(config, dist.world_size, dist.device.type)
        smaller = [candidate for candidate in candidates if candidate < size]
        fitting = largest_that_fits(smaller, memory_probe(config, dataset, dist, limit_bytes), limit_bytes)
        return replace(result, out_of_memory=True, fitting_size=fitting)


def _measure(trainer: Trainer, tokenizer: Tokenizer, can_save: bool, say: Say) -> Measurements:
    say("steps")
    measured = _time_steps(trainer)
    if not measured.finite:
        return measured
    say("evaluations")
    measured = replace(measured, evals=_time_evals(trainer, tokenizer))
    if not can_save:
        return measured
    say("a checkpoint")
    try:
        save_s, load_s, n_bytes = _time_checkpoint(trainer, tokenizer)
    except TrainingDiverged:
        return replace(measured, finite=False)
    return replace(measured, save_s=save_s, load_s=load_s, checkpoint_bytes=n_bytes)


def _time_steps(trainer: Trainer) -> Measurements:
    """Two short steps, the second one timed, then whole steps if they take less than STEPS_S.

    Args:
        trainer: its batch is a step's with at most MEMORY_ACCUM_STEPS.
    """
    config, dist, position, done = trainer.ctx.config, trainer.ctx.dist, trainer.loader.position, 0

    def step(trainer: Trainer) -> tuple[float, float, float]:
        """Loss, gradient norm and seconds."""
        nonlocal done
        started = time.perf_counter()
        trainer.guard.record(_state(trainer, done))
        loss, grad_norm, _ = train_step(trainer, done)
        done += 1
        return float(loss), float(grad_norm), time.perf_counter() - started  # both wait for the device

    loss, grad_norm, _ = step(trainer)
    *_, seconds = step(trainer)
    while trainer.guard.loss_scale is not None and not isfinite(grad_norm) and done < LOSS_SCALE_STEPS:
        # As at the start of a run, the scale is halved until nothing overflows.
        loss, grad_norm, seconds = step(trainer)
    whole = batch_plan(config, dist.world_size)
    fraction = trainer.batch.grad_accum_steps / whole.grad_accum_steps
    step_s = distributed.broadcast_object(seconds) / fraction
    times = min(STEPS, int(STEPS_S / step_s))
    if times:
        with BatchLoader(trainer.dataset.order(whole), whole, position, dist.rank, dist.device) as loader:
            whole_trainer = replace(trainer, batch=whole, loader=loader)
            step_s = distributed.broadcast_object(median(step(whole_trainer)[2] for _ in range(times)))
    loss, grad_norm = distributed.broadcast_object((loss, grad_norm))
    finite = isfinite(loss) and isfinite(grad_norm)
    return Measurements(step_s, times, 1.0 if times else fraction, loss, grad_norm, finite)


def _state(trainer: Trainer, step: int) -> TrainState:
    return TrainState(step, 0, DataPosition(0, 0, trainer.ctx.config.train.seed, trainer.dataset.fingerprint))


def _time_evals(trainer: Trainer, tokenizer: Tokenizer) -> dict[str, tuple[float, str]]:
    """By evaluation: seconds of one batch on each rank after a warm-up, and the error if it failed."""
    ctx = trainer.ctx
    folder = ctx.paths.root.parent
    lines: list[str] = []
    config = shorten_evals(ctx.config, ctx.dist.world_size)
    names = ["hellaswag", *(task.partition(":")[0] for task in config.eval.tasks)]
    files = {name: folder / f"{name}.jsonl" for name in names}
    if ctx.dist.is_rank_zero:
        for name, file in files.items():
            count = config.eval.hellaswag_examples if name == "hellaswag" else config.eval.tasks_examples
            file.write_text(f"{json.dumps(TASKS[name].sample)}\n" * (count or 0), encoding="utf-8")
    tasks = tuple(f"{name}:{files[name]}" for name in names[1:])
    config = replace(config, eval=replace(config.eval, hellaswag_file=str(files["hellaswag"]), tasks=tasks))
    ctx = RunContext.create(config, ctx.dist, ctx.paths, log=lines.append)
    vote = StopVote(StopRequest(), Heartbeat(folder / "heartbeat.json", writes=False))
    state, watch, found = _state(trainer, STEPS), ReferenceWatch(None), {}
    for evaluation in build_evals(ctx, trainer.eval_model, trainer.dataset, tokenizer, vote):
        for _ in range(2):  # the first one is a warm-up
            lines.clear()
            started = time.perf_counter()
            with full_params(trainer.model, trainer.eval_model):
                run_eval(evaluation, ctx, state, trainer.eval_model, watch, vote)
            seconds = time.perf_counter() - started
        # A run continues without an evaluation that fails; for a rehearsal that is a problem.
        failed = (line for line in lines if line.startswith(f"the {evaluation.name} evaluation failed"))
        found[evaluation.name] = seconds, next(failed, "")
    return distributed.broadcast_object(found)


def _time_checkpoint(trainer: Trainer, tokenizer: Tokenizer) -> tuple[float, float, int]:
    """Seconds of a save, seconds of a load, and bytes on the disk."""
    ctx, model, optimizer = trainer.ctx, trainer.model, trainer.optimizer
    started = time.perf_counter()
    with AsyncSaver(ctx.config, ctx.paths, model, optimizer, tokenizer, ctx.dist) as saver:
        saver.save(_state(trainer, STEPS))
    saved_at = time.perf_counter()
    saved = load_latest(ctx.paths.checkpoints, ctx.log)
    assert saved is not None
    restore(saved, ctx, trainer.dataset, model, optimizer)
    loaded_at = time.perf_counter()
    n_bytes = folder_bytes(ctx.paths.checkpoints) if ctx.dist.is_rank_zero else 0
    return distributed.broadcast_object((saved_at - started, loaded_at - saved_at, n_bytes))
