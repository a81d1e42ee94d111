"""A short rehearsal before a long run: does it fit, how long does it take, what does it cost?

Real steps, a batch of every planned evaluation, a sample, a save and a load: with the run's own model, optimizer,
precision and ranks, at full shapes, on made-up text (rehearsal.py). What follows from the figures is in
preflight_report.py.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from pathlib import Path
from statistics import median

from myllm.checkpoint.async_saver import AsyncSaver
from myllm.checkpoint.format import load_latest
from myllm.checkpoint.retention import list_checkpoints, step_of
from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import full_params
from myllm.errors import TrainingDiverged, UserError
from myllm.paths import RunPaths
from myllm.planning.batch import BatchPlan, batch_plan
from myllm.planning.length import length_note, resolve_max_steps
from myllm.runs.heartbeat import Heartbeat
from myllm.runs.logs import Log
from myllm.runs.reference_curve import ReferenceWatch
from myllm.training.context import RunContext
from myllm.training.evaluator import Eval, StopVote, build_evals, run_eval
from myllm.training.restore import restore
from myllm.training.setup import check_data
from myllm.training.stop_signals import StopRequest

from .batch_size import candidate_sizes, is_safe_to_try, largest_that_fits, memory_probe, resolve_micro_batch_size
from .data_and_disk import DataAndDisk, find_prepared, inspect_data_and_disk, tokenizer_for
from .rehearsal import (
    OutOfMemory,
    Parts,
    memory_limit_bytes,
    run_within_memory,
    scratch_folder,
    shorten,
    synthetic_dataset,
    synthetic_hellaswag,
)
from .summary import Limits, Measurements, PreflightResult, shorten_evals

STEPS = 3
"""Timed, after a warm-up."""
SETTLING_STEPS = 20
"""Before a loss scale that still overflows is taken for bad numbers; it gets from its first to its least in 16."""
STEPS_S = 30.0
"""Where a whole step takes so long that these would take longer, fewer or a part of one are timed."""


def preflight(
    config: RunConfig,
    process: DistContext,
    bounds: Limits,
    say: Callable[[str], None] = print,
    limit_bytes: int | None = None,
    own_text: bool = False,
) -> PreflightResult:
    """Rehearse a run. It leaves nothing behind, and neither the run's folder nor the random state is touched.

    Args:
        say: called on every rank with a line about what is being done.
        limit_bytes: memory that one rank may use; None: what there is, less headroom.
        own_text: as for `plan.with_length`.

    Raises:
        UserError: settings that could not be trained with, whatever the machine.
    """
    tokenizer, room, done, val_tokens = _found_here(config, process)
    if room.tokens:
        config = resolve_max_steps(config, room.tokens, own_text)
    else:
        say(length_note(config, own_text) or "how much text there is is not known yet")
        config = replace(config, train=replace(config.train, epochs=None))
    limit_bytes = memory_limit_bytes(process) if limit_bytes is None else limit_bytes
    if done >= config.train.max_steps:
        return PreflightResult(config, process, bounds, room, limit_bytes, done)
    config, settled = resolve_micro_batch_size(config, tokenizer, process, val_tokens, limit_bytes)
    if settled:
        say(settled)
    findings = PreflightResult(config, process, bounds, room, limit_bytes, done)
    with scratch_folder(process) as folder:
        dataset = synthetic_dataset(config, folder, tokenizer, process)
        check_data(config, dataset, batch_plan(config, process.world_size))
        size = config.train.micro_batch_size
        try:
            if not is_safe_to_try(config, process, size, limit_bytes):
                raise OutOfMemory
            measured, peak = run_within_memory(
                lambda: _rehearse(config, dataset, tokenizer, process, folder, findings.has_room_to_save, say),
                process,
                limit_bytes,
            )
            return replace(findings, measured=replace(measured, peak_bytes=peak))
        except OutOfMemory:
            pass
        say(f"out of memory with train.micro_batch_size {size}; looking for one that fits")
        smaller = [each for each in candidate_sizes(config, process) if each < size]
        fits = largest_that_fits(smaller, memory_probe(config, dataset, process, limit_bytes), limit_bytes)
        return replace(findings, out_of_memory=True, fits=fits)


def _found_here(config: RunConfig, process: DistContext) -> tuple[Tokenizer, DataAndDisk, int, int | None]:
    """Vocabulary, room, steps that are done, and held-out tokens if the data set is prepared, as rank 0 finds them.

    Raises:
        UserError: text that is not there, or too little of it for one step; on every rank.
    """
    room, done, val_tokens, failure = None, 0, None, None
    if process.is_rank_zero:
        try:
            room, done, made = inspect_data_and_disk(config), _steps_done(config), find_prepared(config.data)
            if made is not None and made.complete:
                check_data(config, made, batch_plan(config, process.world_size))
                val_tokens = made.val.tokens
        except UserError as error:
            failure = error
    room, done, val_tokens, failure = distributed.broadcast_object((room, done, val_tokens, failure))
    if failure:
        raise failure
    return tokenizer_for(config), room, done, val_tokens


def _rehearse(
    config: RunConfig,
    dataset: Dataset,
    tokenizer: Tokenizer,
    process: DistContext,
    folder: Path,
    may_save: bool,
    say: Callable[[str], None],
) -> Measurements:
    with ExitStack() as stack:
        parts = Parts(config, process, stack)
        say("steps")
        measured = _timed_steps(parts, dataset)
        if not measured.finite:
            return measured
        say("evaluations")
        measured = replace(measured, evals=_timed_evals(parts, dataset, tokenizer, folder))
        if not may_save:
            return measured
        say("a checkpoint")
        try:
            save_s, load_s, n_bytes = _timed_save(parts, dataset, tokenizer, folder)
        except TrainingDiverged:
            return replace(measured, finite=False)
        return replace(measured, save_s=save_s, load_s=load_s, checkpoint_bytes=n_bytes)


def _timed_steps(parts: Parts, dataset: Dataset) -> Measurements:
    """A warm-up of two micro-steps, the same again timed, then whole steps as far as they take less than `STEPS_S`."""
    config, process = parts.config, parts.process
    whole = batch_plan(config, process.world_size)
    short, step, seconds, first = shorten(whole), 0, [], None

    def run(batch: BatchPlan, times: int) -> None:
        nonlocal step, first
        with parts.loader(dataset, batch) as loader:
            for _ in range(times):
                started = time.perf_counter()
                figures = parts.step(loader, dataset, batch, step)
                seconds.append(time.perf_counter() - started)
                if first is None or (parts.guard.loss_scale is not None and not isfinite(first[1])):
                    first = figures
                step += 1

    run(short, 2)
    while parts.guard.loss_scale is not None and not isfinite(first[1]) and step < SETTLING_STEPS:
        run(short, 1)  # as at the start of the run, the loss scale is halved until nothing overflows
    share = short.grad_accum_steps / whole.grad_accum_steps
    expected_s = distributed.broadcast_object(seconds[-1]) / share
    times = min(STEPS, int(STEPS_S / expected_s))
    if times:
        seconds.clear()
        run(whole, times)
        share = 1.0
    step_s = distributed.broadcast_object(median(seconds) if times else expected_s)
    loss, grad_norm = (distributed.broadcast_object(value) for value in first)
    return Measurements(step_s, times, share, loss, grad_norm)


def _timed_evals(parts: Parts, dataset: Dataset, tokenizer: Tokenizer, folder: Path) -> dict[str, tuple[float, str]]:
    """By evaluation: seconds of one batch on each rank, after a warm-up, and what it said if it failed."""
    config, process = shorten_evals(parts.config, parts.process.world_size), parts.process
    if process.is_rank_zero:
        synthetic_hellaswag(folder, config.eval.hellaswag_examples or 0)
    config = replace(config, eval=replace(config.eval, hellaswag_file=str(folder / "hellaswag.jsonl")))
    said: list[str] = []
    ctx = RunContext.create(config, process, RunPaths(folder), said.append)
    state, watch = parts.state(dataset, STEPS), ReferenceWatch(None)
    found, poll = {}, StopVote(StopRequest(), Heartbeat(folder / "heartbeat.json", writes=False))
    for each in build_evals(ctx, parts.whole, dataset, tokenizer, poll):
        if not each.every_steps:
            continue
        for _ in range(2):  # the first one is a warm-up
            said.clear()
            started = time.perf_counter()
            with full_params(parts.model, parts.whole):
                run_eval(each, ctx, state, parts.whole, watch, poll)
            seconds = time.perf_counter() - started
        found[each.name] = (seconds, _failure(each, said))
    return distributed.broadcast_object(found)


def _failure(each: Eval, said: list[str]) -> str:
    """What `run_eval` said of an evaluation that failed; it goes on where a rehearsal should not."""
    return next((line for line in said if line.startswith(f"the {each.name} evaluation failed")), "")


def _timed_save(parts: Parts, dataset: Dataset, tokenizer: Tokenizer, folder: Path) -> tuple[float, float, int]:
    """Seconds of a save, seconds of a load, and bytes on the disk."""
    config, process, run, log = parts.config, parts.process, RunPaths(folder), Log(folder / "log.txt", False)
    started = time.perf_counter()
    with AsyncSaver(config, run, parts.model, parts.optimizer, tokenizer, process) as saver:
        saver.save(parts.state(dataset, STEPS))
    saved_at = time.perf_counter()
    saved = load_latest(run.checkpoints, log)
    restore(saved, RunContext.create(config, process, run, log), dataset, parts.model, parts.optimizer)
    loaded_at = time.perf_counter()
    n_bytes = (
        sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file()) if process.is_rank_zero else 0
    )
    return distributed.broadcast_object((saved_at - started, loaded_at - saved_at, n_bytes))


def _steps_done(config: RunConfig) -> int:
    """Where the run of this name will go on, by its newest checkpoint's name."""
    if config.train.fresh:
        return 0
    newest = list_checkpoints(RunPaths.of(config.name).checkpoints)[:1]
    return step_of(newest[0]) if newest else 0
