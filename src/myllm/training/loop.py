"""The training loop: from step 0 or the newest checkpoint to the last step.

Between two steps is a step boundary. There the ranks agree whether to stop, a checkpoint is saved if one is due, then
the evaluations that are due run, and the run ends if it is time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.preparation_lock import PreparationEnded
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import full_params
from myllm.paths import RunPaths
from myllm.planning.disk import save_due

from .evaluator import Eval, EvalInterrupted, run_eval
from .run_log import describe_end, log_best, out_of_patience, record_complete_data, record_start
from .services import Services, open_run, start_services
from .setup import RunContext, Trainer, build, resolve_config
from .step import train_step
from .throughput import console_line, progress_text


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    run: RunPaths
    step: int
    stopped_by: int | None
    """The signal that requested a stop, or errors.TIME_LIMIT; None if the run is complete or stopped early."""
    stopped_early: bool = False
    """Early stopping ended the run (train.early_stop_patience)."""


@dataclass(frozen=True)
class Ending:
    """Why the run ends at a step boundary."""

    early: bool
    complete: bool
    """Nothing is left to do. Otherwise a stop was requested, and the same command resumes."""


@dataclass
class Progress:
    """How far the run is."""

    state: TrainState
    saved: TrainState
    """Of the newest checkpoint."""
    pending: Sequence[Eval]
    """Evaluations that have not run at this boundary."""
    published_step: int | None = None


def train(
    config: RunConfig,
    dataset: Dataset,
    dist: DistContext,
    on_checkpoint: Callable[[int], None] = lambda step: None,
    started: float | None = None,
    profile: bool = False,
    notes: Sequence[str] = (),
) -> Outcome:
    """Train until the last step, early stopping, a stop request, or the first step that diverges.

    Args:
        config: train.micro_batch_size is a number.
        on_checkpoint: called on rank 0 with the step of each checkpoint, after the evaluations at that step.
        started: when train.max_wall_s began to count, by the monotonic clock; None: now.
        profile: record a few of the first steps into the run's profile/.
        notes: the first lines of the log.

    Raises:
        UserError: too little data, a run folder in use, a checkpoint with other settings, a full disk.
        TrainingDiverged: a gradient was not finite, or too many updates in a row were skipped.
    """
    ctx = RunContext.create(resolve_config(config, dataset, dist), dist, started=started)
    with open_run(ctx, notes) as heartbeat, build(ctx, dataset) as (trainer, state):
        record_start(trainer, state)
        with start_services(trainer, state, heartbeat, on_checkpoint, profile) as services:
            progress = Progress(state, saved=state, pending=services.evals)
            while (ending := boundary(trainer, services, progress)) is None:
                if wait_for_data(trainer, services, progress):
                    advance(trainer, services, progress)
            return finish(trainer, services, progress, ending)


def boundary(trainer: Trainer, services: Services, progress: Progress) -> Ending | None:
    """Save and evaluate what is due at this step.

    Returns:
        None: the run continues.
    """
    config, heartbeat = trainer.ctx.config, services.heartbeat
    while True:
        step = progress.state.step
        heartbeat.reached(step)
        stopping = vote_to_stop(services)
        early = out_of_patience(progress.state, config)
        last_step = step if early else config.train.max_steps
        ends = stopping or step >= last_step
        if save_due(config.train, step, ends):
            save_new_state(trainer, services, progress)
        if not stopping and not evaluate(trainer, services, progress, last_step):
            continue  # a stop was requested: the next vote sees it
        if not ends and out_of_patience(progress.state, config):
            continue  # this is the last boundary after all
        if not ends:
            publish(trainer, services, progress)
            return None
        with services.doing("saving"):
            services.saver.wait()
        if not stopping:
            publish(trainer, services, progress)
        return Ending(early, complete=step >= last_step and not due_evals(progress, last_step))


def vote_to_stop(services: Services) -> bool:
    """True on all ranks if any rank was asked to stop.

    Raises:
        Exception: a checkpoint could not be written; on all ranks.
    """
    if services.saver.slowest_s is not None:
        services.stop.save_s = services.saver.slowest_s  # how much of the time limit the last save needs
    stopping, save_failed = distributed.all_reduce_any(services.stop.requested(), services.saver.failed)
    if save_failed:
        services.saver.raise_failure()
    return stopping


def save_new_state(trainer: Trainer, services: Services, progress: Progress) -> None:
    """Start writing a checkpoint, unless this very state is in the newest one."""
    if progress.state != progress.saved:
        save(trainer, services, progress)
        progress.saved = progress.state


def save(trainer: Trainer, services: Services, progress: Progress, best: bool = False) -> None:
    """
    Raises:
        TrainingDiverged: the weights must not be saved.
    """
    with services.doing("saving"):
        progress.state = services.meter.with_digest(check_updates(trainer, progress.state))
        services.saver.save(progress.state, best)


def evaluate(trainer: Trainer, services: Services, progress: Progress, last_step: int) -> bool:
    """Run the evaluations that are due, and keep the best checkpoint for early stopping.

    Returns:
        False: interrupted by a stop request.
    """
    due = due_evals(progress, last_step)
    if not due:
        return True
    ctx, model, early_stop_on = trainer.ctx, trainer.eval_model, trainer.ctx.config.train.early_stop_on
    counted = f"validation/{early_stop_on}" if early_stop_on else "validation"
    with services.doing("evaluating"), services.gc.automatic(), full_params(trainer.model, model):
        try:
            for evaluation in due:
                with services.evaluating(evaluation.name):
                    rows = run_eval(evaluation, ctx, progress.state, model, services.reference, services.eval_vote)
                if counted in rows:
                    count_validation(trainer, services, progress, rows[counted]["loss"])
        except EvalInterrupted:
            return False
    progress.pending = [evaluation for evaluation in progress.pending if evaluation not in due]
    return True


def due_evals(progress: Progress, last_step: int) -> list[Eval]:
    return [evaluation for evaluation in progress.pending if evaluation.is_due(progress.state.step, last_step)]


def count_validation(trainer: Trainer, services: Services, progress: Progress, loss: float) -> None:
    """Early stopping: count a validation, and save the checkpoint if its loss is the lowest so far."""
    before = progress.state.early_stop
    if before:
        after = before.after(progress.state.step, loss)
        progress.state = replace(progress.state, early_stop=after)
        if after.best_step != before.best_step:
            save(trainer, services, progress, best=True)


def publish(trainer: Trainer, services: Services, progress: Progress) -> None:
    """Announce the newest complete checkpoint once."""
    step = services.saver.written_step
    if trainer.ctx.dist.is_rank_zero and step not in (None, progress.published_step):
        progress.published_step = step
        services.on_checkpoint(step)


def wait_for_data(trainer: Trainer, services: Services, progress: Progress) -> bool:
    """Wait until every rank can read the data of the next step, which may still be in preparation.

    Returns:
        False: a stop was requested.

    Raises:
        PreparationEnded: the data will not come. The state is saved.
    """
    waiting = partial(services.doing, "waiting for data")
    on_complete = partial(record_complete_data, trainer)
    try:
        return trainer.loader.wait_for_step(services.stop.requested, trainer.ctx.log, waiting, on_complete)
    except PreparationEnded:
        if progress.state.step:
            save_new_state(trainer, services, progress)
        raise


def advance(trainer: Trainer, services: Services, progress: Progress) -> None:
    """Train one step."""
    train, state = trainer.ctx.config.train, progress.state
    trainer.guard.record(state)
    with services.profiler.around(state.step):
        loss, grad_norm, lr = train_step(trainer, state.step, services.profiler.phase)
    progress.state = state = replace(
        state,
        step=state.step + 1,
        tokens_seen=state.tokens_seen + trainer.batch.batch_tokens,
        data=trainer.loader.position,
    )
    progress.pending = services.evals
    services.gc.after_step(state.step)
    services.bar.update()
    if state.step % train.log_every_steps == 0 or state.step == train.max_steps:
        log_step(trainer, services, progress, loss, grad_norm, lr)


def log_step(
    trainer: Trainer, services: Services, progress: Progress, loss: Tensor, grad_norm: Tensor, lr: float
) -> None:
    ctx, meter = trainer.ctx, services.meter
    progress.state = state = replace(meter.with_digest(progress.state), skips=trainer.guard.sync())
    row = meter.measure(state, loss, grad_norm, lr)
    if ctx.dist.is_rank_zero:
        for row_of_kind in (*meter.overhead(state.step), row):
            ctx.metrics.append(row_of_kind)
        services.bar.set_postfix_str(progress_text(row, ctx.config.train.max_steps), refresh=False)
        ctx.log(console_line(row, ctx.config.train.max_steps))
    with services.heartbeat.doing("checking"):  # after the row, so that a step that diverged has one
        check_updates(trainer, state)


def check_updates(trainer: Trainer, state: TrainState) -> TrainState:
    """The state with the guard's counts. Every rank calls this at the same steps.

    Raises:
        TrainingDiverged: the run has an anomaly dump of the step.
    """
    state = replace(state, skips=trainer.guard.sync())
    if trainer.guard.skipped:
        from .anomaly.report import raise_if_diverged  # loaded only when an update was skipped

        raise_if_diverged(state, trainer)
    return state


def finish(trainer: Trainer, services: Services, progress: Progress, ending: Ending) -> Outcome:
    ctx, step = trainer.ctx, progress.state.step
    if ending.complete:
        log_best(ctx, progress.state)
    stopped_by = None if ending.complete else max(distributed.all_gather_object(services.stop.signal or 0))
    services.meter.finish(step)
    services.heartbeat.end(*describe_end(ctx.config, step, stopped_by, ending.early))
    return Outcome(ctx.paths, step, stopped_by, ending.early)
