"""The loop: one run from its first step, or its newest checkpoint, to its last."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from myllm.checkpoint.async_saver import AsyncSaver
from myllm.checkpoint.format import checkpoint_dir, load_latest
from myllm.checkpoint.retention import clean_up_partial, save_due
from myllm.checkpoint.state import EarlyStop, TrainState
from myllm.config import DataConfig, RunConfig, to_dict
from myllm.data.dataloader import BatchLoader
from myllm.data.dataset import Dataset
from myllm.data.prepare.status import describe_progress
from myllm.data.sampler import DataPosition, count_sequences
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed import launcher as ranks
from myllm.distributed.collectives import DistContext
from myllm.distributed.cpu_threads import threads_reason
from myllm.distributed.device_info import device_name
from myllm.distributed.parallelize import full_params, shard
from myllm.distributed.precision import compute_dtype, dtype_name
from myllm.errors import UserError, exit_code
from myllm.files import write_json
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW
from myllm.paths import RunPaths
from myllm.planning.batch import BatchPlan, batch_plan
from myllm.planning.flops import n_parameters
from myllm.planning.length import describe_length, resolve_max_steps, warmup_note
from myllm.runs.heartbeat import Heartbeat, newest_checkpoint_step
from myllm.runs.logs import JsonlFile, Log, environment
from myllm.runs.reference_curve import ReferenceWatch, find_reference
from myllm.runs.run_dir import (
    check_has_imported_weights,
    check_shared_disk,
    claim_run,
    start_over,
    truncate_logs,
    write_config,
)
from myllm.training.preflight.batch_size import resolve_micro_batch_size

from . import gc_schedule as garbage
from .context import RunContext
from .evaluator import EvalInterrupted, StopVote, build_evals, run_eval
from .gradient_guard import GradientGuard
from .growing import known_sequences, wait_for_data
from .kernels import fast_kernels
from .profiler import NoProfiler, Profiler
from .restore import restore
from .setup import Trainer
from .step import train_step
from .stop_signals import describe_stop, handle_stop_signals
from .throughput import ThroughputMeter, console_line, progress
from .watchdog import watched


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    run: RunPaths
    step: int
    stopped_by: int | None
    """The signal that asked for a stop, or signals.TIME_LIMIT; None where the run is complete or stopped early."""
    stopped_early: bool = False
    """Whether train.early_stop_patience ended it."""


def train(
    config: RunConfig,
    dataset: Dataset,
    process: DistContext,
    on_checkpoint: Callable[[int], None] = lambda step: None,
    started: float | None = None,
    profile: bool = False,
) -> Outcome:
    """Train to the end, to the end of patience, to a signal or the time limit, or to the first gradient that is not
    finite.

    Args:
        on_checkpoint: called on rank 0 with the step of each checkpoint, once what is due at that step is measured.
        started: by the monotonic clock, from when on train.max_wall_s counts; None: from now on.
        profile: record a few of the first steps into the run's profile/.

    Raises:
        UserError: too little data, a run folder in use, a checkpoint of other settings, a full disk.
        TrainingDiverged: a gradient was not finite, or too many updates in a row were skipped.
    """
    began = time.monotonic() if started is None else started
    if dataset.complete:
        config = resolve_max_steps(config, dataset.train.tokens)
    elif config.train.epochs is not None:
        raise UserError(f"train.epochs needs all of {dataset.name}, whose preparation is not over; prepare it first")
    run, max_steps, patience = RunPaths.of(config.name), config.train.max_steps, config.train.early_stop_patience
    batch = batch_plan(config, process.world_size)
    check_data(config, dataset, batch)
    tokenizer = dataset.tokenizer()
    config = replace(config, data=dataset.settings(config.data))  # what the run keeps of it is the data set's own word
    config, settled = resolve_micro_batch_size(config, tokenizer, process, dataset.val.tokens, rehearsed=True)
    batch = batch_plan(config, process.world_size)
    with ExitStack() as stack:
        # -- the run's folder, which this process holds until it ends ------------------------------------------------
        (restarted,) = distributed.all_reduce_any(ranks.is_restart())  # what is begun afresh once goes on afterwards
        if process.is_rank_zero:
            stack.enter_context(claim_run(run))
            aside = start_over(run, config) if config.train.fresh and not restarted else None
            for folder in (run.checkpoints, run.best, run.anomalies):
                clean_up_partial(folder)
        beat = Heartbeat(run.heartbeat, newest_checkpoint_step(run), writes=process.is_rank_zero)
        beat.write(now=True)  # what takes its place is the end of the start before
        distributed.barrier()
        check_shared_disk(run, process)
        log = Log(run.log, process.is_rank_zero)
        metrics, samples = JsonlFile(run.metrics, log), JsonlFile(run.samples, log)
        if process.is_rank_zero and aside:
            log(f"fresh start: the older run was moved to {aside}")
        if settled:
            log(settled)

        # -- model and optimizer; a checkpoint knows better ----------------------------------------------------------
        model = Transformer(config.model, config.train.seed).to(process.device)
        whole = shard(model, config, process)  # what evaluations see
        optimizer = ScheduledAdamW(model.named_parameters(), config.optim, max_steps)
        torch.manual_seed(config.train.seed + process.rank)  # dropout differs between ranks
        state = TrainState(0, 0, DataPosition(0, 0, config.train.seed, dataset.fingerprint))
        if saved := load_latest(run.checkpoints, log):
            state = restore(saved, config, dataset, model, optimizer, process, log)
        else:
            check_has_imported_weights(run)
        state = replace(state, early_stop=(state.early_stop or EarlyStop()) if patience else None)
        if process.is_rank_zero:
            truncate_logs(run, state.step)
            write_config(run, config)
        write_environment(run, config, dataset, process)
        say_start(log, config, dataset, batch, state, process)

        # -- what the loop turns with --------------------------------------------------------------------------------
        runner = stack.enter_context(fast_kernels(model, config, process, log))
        stop = stack.enter_context(handle_stop_signals(config.train.max_wall_s, started))
        beat.step = state.step
        poll = StopVote(stop, beat)
        evals = pending = build_evals(config, whole, dataset, tokenizer, process, samples, log, poll)
        earlier = metrics.rows() if process.is_rank_zero else ()
        watch = ReferenceWatch(find_reference(to_dict(config)), earlier)
        saver = stack.enter_context(AsyncSaver(config, run, model, optimizer, tokenizer, process))
        saver.check_room(state.step)
        loader = stack.enter_context(BatchLoader(dataset.train, batch, state.data, process.rank, process.device))
        stack.enter_context(watched(beat, loader, stop, run, process, config.train.collective_timeout_s, log))
        hidden = None if process.is_rank_zero else True  # None: shown on a terminal only
        # No rate of tqdm's own: it knows neither what a device has still to do nor what is counted apart.
        shown = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        bar = stack.enter_context(
            tqdm(total=max_steps, initial=state.step, bar_format=shown, disable=hidden, leave=False)
        )
        collected = stack.enter_context(garbage.GcSchedule(state.step))
        meter = ThroughputMeter(config, process, loader, state.step, began)
        profiler = Profiler(run, config, state.step, process, log, meter) if profile else NoProfiler()
        guard = GradientGuard(config.train, process.device, state.skips)
        ctx = RunContext(config, process, run, log, metrics, samples)
        trainer = Trainer(ctx, batch, model, whole, runner, optimizer, loader, guard)

        def checked(state: TrainState) -> TrainState:
            state = replace(state, skips=guard.sync())
            if guard.skipped:
                from .anomaly.report import raise_if_diverged

                raise_if_diverged(state, trainer, dataset)
            return state

        stored = state if saved else None
        told_step = None
        failure: UserError | None = None

        while True:
            # -- a step boundary: save, evaluate, stop, each if it is time -------------------------------------------
            beat.reached(state.step)
            stop.note_save_time(saver.slowest_s)
            stopping, growing, unsaved = distributed.all_reduce_any(
                stop.requested(), not dataset.complete, saver.failed
            )
            if unsaved:
                saver.fail()
            early = out_of_patience(state, config)
            last_step = state.step if early else max_steps
            ending = stopping or state.step >= last_step or failure is not None
            if save_due(config, state.step, ending) and state != stored:
                with meter.timed("saving"), beat.doing("saving"):
                    state = meter.with_digest(checked(state))
                    saver.save(state)
                    stored = state
            if failure:
                raise failure
            due = [each for each in pending if each.due(state.step, last_step)]
            unmeasured = stopping and bool(due)
            if due and not stopping:
                pending = [each for each in pending if each not in due]
                try:
                    with (
                        meter.timed("evaluating"),
                        beat.doing("evaluating"),
                        collected.automatic(),
                        full_params(model, whole),
                    ):
                        for each in due:
                            with meter.timed(each.name):
                                figures = run_eval(each, state, whole, config, process, watch, metrics, log, poll)
                            if state.early_stop and each.name == "validation" and figures:
                                before, state = state, count_validation(state, figures["loss"])
                                if state.early_stop.best_step != before.early_stop.best_step:
                                    with meter.timed("saving"):
                                        state = meter.with_digest(checked(state))
                                        saver.save(state, best=True)
                except EvalInterrupted:  # by a stop, which is seen once more at this boundary
                    pending = [*due, *pending]
                    continue
            if out_of_patience(state, config) and not ending:
                continue  # once more past this boundary, as the last: what was not due is measured, and all is saved
            if ending:
                with meter.timed("saving"), beat.doing("saving"):
                    saver.wait()
            if process.is_rank_zero and saver.written_step not in (None, told_step) and not stopping:
                told_step = saver.written_step
                on_checkpoint(told_step)
            if ending:
                complete = (early or state.step >= max_steps) and not unmeasured
                if complete:
                    say_best(log, run, config, state)
                stopped_by = None if complete else distributed.all_reduce_max(stop.signal or 0)
                meter.finish(state.step, metrics, log)
                beat.end(*how_it_ended(config, state, stopped_by, early))
                return Outcome(run, state.step, stopped_by, early)

            # -- the step; its data may still be in the making -------------------------------------------------------
            if growing:
                with beat.doing("waiting for data"):
                    there, failure = wait_for_data(dataset, state.data, batch, stop, meter, log)
                if not there:
                    continue
                if dataset.complete:  # only now is known how much there is
                    check_data(config, dataset, batch)
                    try:
                        write_environment(run, config, dataset, process)
                    except OSError as error:
                        log(f"cannot write {run.environment}: {error.strerror}; training goes on")
                    for line in ("whole now", *describe_length(config, dataset.train.tokens)):
                        log(f"data: {line}")
            guard.record(state)
            with profiler.around(state.step):
                loss, grad_norm, rate = train_step(
                    runner, optimizer, loader, batch, state.step, config, process, guard, profiler.phase
                )
            state = replace(
                state,
                step=state.step + 1,
                tokens_seen=state.tokens_seen + batch.batch_tokens,
                data=state.data.advance(batch.sequences, known_sequences(dataset, batch)),
            )
            collected.after(state.step)
            pending = evals
            bar.update()
            if state.step % config.train.log_every_steps == 0 or state.step == max_steps:
                state = replace(meter.with_digest(state), skips=guard.sync())
                row = meter.measure(state, loss, grad_norm, rate)
                if process.is_rank_zero:
                    for each in (*meter.overhead(state.step), row):
                        metrics.append(each)
                    bar.set_postfix_str(progress(row), refresh=False)
                    log(console_line(row, max_steps))
                with beat.doing("checking"):  # after the row of a step that ends the run, and takes its time over it
                    checked(state)


def check_data(config: RunConfig, dataset: Dataset, batch: BatchPlan) -> None:
    """
    Raises:
        UserError: too little text for one step, or for one sequence of validation; a tokenizer that does not fit the
            model; held-out text that was damaged. Shards to train on are checked as they come up (data/loader.py).
    """
    dataset.val.verify(np.zeros(1, dtype=np.int64), dataset.val.tokens)
    need_val = batch.seq_len + 1  # validation takes batches that are not full
    if config.eval.validation_every_steps and dataset.val.tokens < need_val:
        # What is held out is at most a tenth of the source: asking for more helps only below that.
        more = "raise data.val_tokens, " if dataset.val.tokens >= config.data.val_tokens else ""
        raise UserError(
            f"the data set {dataset.name} holds out {dataset.val.tokens:,} tokens, too few for one sequence of "
            f"model.max_seq_len {batch.seq_len:,} and its last target; add text, {more}lower model.max_seq_len, or set "
            "eval.validation_every_steps to 0"
        )
    have = count_sequences(dataset.train.tokens, batch.seq_len)
    if dataset.complete and have < batch.sequences:
        raise UserError(
            f"the data set {dataset.name} has {dataset.train.tokens:,} training tokens, {have:,} sequences of "
            f"{batch.seq_len:,}, fewer than the {batch.sequences:,} of one step; add text or lower train.batch_tokens"
        )
    made_with = dataset.manifest["tokenizer"]
    if config.data.tokenizer != DataConfig.tokenizer:  # asked for by name
        wanted = load_tokenizer(config.data.tokenizer)
        if wanted.sha256 != made_with["sha256"]:
            raise UserError(
                f"the data set {dataset.name} was made with the vocabulary {made_with['name']}, but data.tokenizer "
                f"asks for {wanted.name}; prepare data with that one, or leave data.tokenizer out"
            )
    known = made_with["vocab_size"]
    if config.model.vocab_size != known:
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size:,}, but the tokenizer of {dataset.name} knows {known:,} "
            f"tokens; set it to {known} (rows beyond that for speed are model.vocab_multiple's job)"
        )


def write_environment(run: RunPaths, config: RunConfig, dataset: Dataset, process: DistContext) -> None:
    """What the run runs on: the machine, the versions, the data."""
    if not process.is_rank_zero:
        return
    about: dict[str, Any] = {
        "parameters": n_parameters(config.model),
        "dataset": dataset.name,
        "dataset_hash": dataset.fingerprint,
        "source": dataset.manifest["source"],
        "tokenizer": dataset.manifest["tokenizer"],
        "train_tokens": dataset.train.tokens if dataset.complete else None,
        "val_tokens": dataset.val.tokens,
        "precision": dtype_name(compute_dtype(config.train.precision, process.device)),
    }
    write_json(run.environment, environment(process.device, process.world_size) | about)


def say_start(
    log: Log, config: RunConfig, dataset: Dataset, batch: BatchPlan, state: TrainState, process: DistContext
) -> None:
    log(f"run {config.name} on {process.world_size} x {device_name(process.device)} ({process.device.type})")
    log(f"CPU threads: {torch.get_num_threads()} a process, {threads_reason()}")
    log(f"model: {n_parameters(config.model):,} parameters; batch: {batch}")
    if dataset.complete:
        for line in (dataset.name, *describe_length(config, dataset.train.tokens)):
            log(f"data: {line}")
    else:
        log(f"data: {dataset.name}, {describe_progress(dataset)}; the preparation goes on beside the training")
    if note := warmup_note(config):
        log(note)
    if out_of_patience(state, config):
        log("nothing left to train: the run has stopped early")
    elif state.step >= config.train.max_steps:
        log(f"nothing left to train: the run is at step {state.step:,}, train.max_steps is {config.train.max_steps:,}")
    else:
        log(f"steps {state.step:,} to {config.train.max_steps:,}; Ctrl-C saves and stops, the same command resumes")


def how_it_ended(config: RunConfig, state: TrainState, stopped_by: int | None, early: bool) -> tuple[str, int]:
    """In words, and as the exit code that says the same."""
    if stopped_by is None:
        return f"{'stopped early' if early else 'complete'}, after step {state.step:,}", 0
    why = describe_stop(stopped_by, config.train.max_wall_s)
    saved = ", saved" if state.step else ""
    return f"stopped by {why} after step {state.step:,}{saved}", exit_code(stopped_by)


def count_validation(state: TrainState, loss: float) -> TrainState:
    return replace(state, early_stop=state.early_stop.after(state.step, loss))


def out_of_patience(state: TrainState, config: RunConfig) -> bool:
    """Whether early stopping ends the run here, before train.max_steps does."""
    early, train = state.early_stop, config.train
    return early is not None and early.exhausted(train.early_stop_patience) and state.step < train.max_steps


def say_best(log: Log, run: RunPaths, config: RunConfig, state: TrainState) -> None:
    """Where early stopping has kept the best checkpoint and, if it ended the run, why and how to go on."""
    early, patience = state.early_stop, config.train.early_stop_patience
    if not early:
        return
    kept = checkpoint_dir(run.best, early.best_step or 0)
    log(f"{early}" + (f"; kept in {kept}" if kept.is_dir() else ""))
    if out_of_patience(state, config):
        log(
            f"stopped early after step {state.step:,} of {config.train.max_steps:,}: train.early_stop_patience is "
            f"{patience}. To train on from here, start the same command with a larger --train.early-stop-patience, or "
            "with None"
        )
