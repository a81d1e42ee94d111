"""What a run needs beside its training steps: its folder, signals, checkpoints, evaluations, measurements."""

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from myllm.checkpoint.async_saver import AsyncSaver
from myllm.checkpoint.layout import newest_step
from myllm.checkpoint.retention import clean_up_partial
from myllm.checkpoint.state import TrainState
from myllm.config import to_dict
from myllm.data.mixture.component_losses import ComponentLosses
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.distributed import collectives as distributed
from myllm.distributed import launcher as ranks
from myllm.distributed.out_of_memory import explain_out_of_memory
from myllm.distributed.terminal import progress_bar, shows_bars
from myllm.runs.heartbeat import Heartbeat
from myllm.runs.reference_curve import ReferenceWatch, find_reference
from myllm.runs.run_dir import archive_old_run, check_new_weights, check_shared_disk, claim_run

from .evaluator import Eval, StopVote, build_evals
from .profiler import Profiler
from .setup import RunContext, Trainer
from .stop_signals import StopRequest, handle_stop_signals
from .throughput import ThroughputMeter
from .watchdog import Watchdog

COLLECT_EVERY_STEPS = 100
# Without tqdm's own rate, which knows neither the work still queued on the device nor the time of evaluations.
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
NARROW_BAR_FORMAT = "{n_fmt}/{total_fmt} [{elapsed}{postfix}]"
NARROW = 60
"""Columns of a terminal that has room for numbers only."""


class GcSchedule:
    """Garbage collection after scheduled steps, on all ranks at once, inside a `with` block.

    Python frees most objects by their reference counts; the collector is for cycles. By itself it runs after a number
    of allocations: on each rank at another moment, while the other ranks wait for that rank's gradients.
    """

    def __init__(self, step: int) -> None:
        """
        Args:
            step: updates that were complete when this process began.
        """
        self._first = step + 1

    def __enter__(self) -> "GcSchedule":
        self._caller_froze = gc.get_freeze_count() > 0
        gc.disable()
        _freeze()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._caller_froze:
            gc.unfreeze()  # all there is: Python has no other way
        gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if it is time. Only the step decides, so all ranks collect together, while the device is busy."""
        if step == self._first:  # torch.compile has finished
            _freeze()
        elif step % COLLECT_EVERY_STEPS == 0:
            gc.collect()

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Python's own schedule, for evaluations: their garbage may hold much memory."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
            gc.collect()


def _freeze() -> None:
    """Exempt what exists (modules, the model, compiled code) from later collections, which then take milliseconds."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Services:
    """What a run has beside the trainer, from its heartbeat to its progress bar."""

    heartbeat: Heartbeat
    stop: StopRequest
    saver: AsyncSaver
    evals: tuple[Eval, ...]
    eval_vote: StopVote
    reference: ReferenceWatch
    meter: ThroughputMeter
    profiler: Profiler
    gc: GcSchedule
    bar: tqdm
    on_checkpoint: Callable[[int], None]

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Count a `with` block as another activity than training, in the times of the log and in heartbeat.json."""
        with self.meter.timed(activity), self.heartbeat.doing(activity):
            yield

    @contextmanager
    def evaluating(self, name: str) -> Iterator[None]:
        """Time an evaluation, and show its name beside the bar."""
        before = getattr(self.bar, "postfix", None) or ""
        self.bar.set_postfix_str(name)
        with self.meter.timed(name):
            yield
        self.bar.set_postfix_str(before)


def step_bar(step: int, max_steps: int, active: bool) -> tqdm:
    """A bar that `update` draws at most ten times a second; `update(0)` too."""
    narrow = shutil.get_terminal_size().columns < NARROW
    return progress_bar(
        max_steps, initial=step, bar_format=NARROW_BAR_FORMAT if narrow else BAR_FORMAT, miniters=0,
        disable=not (active and shows_bars()),
    )  # fmt: skip


@contextmanager
def open_run(ctx: RunContext, notes: Sequence[str] = ()) -> Iterator[Heartbeat]:
    """Hold the run's folder for this process, and start over in it if `train.fresh` is set.

    Args:
        notes: the first lines of this start's log.

    Raises:
        UserError: another process trains in the folder, or ranks see different folders.
    """
    dist, paths, archived = ctx.dist, ctx.paths, None
    (restarted,) = distributed.all_reduce_any(ranks.is_restart())  # a restart resumes what the first start began afresh
    with ExitStack() as stack:
        if dist.is_rank_zero:
            stack.enter_context(claim_run(paths))
            if ctx.config.train.fresh and not restarted:
                if ctx.config.init.source is None:
                    check_new_weights(paths)
                archived = archive_old_run(paths)
            for folder in (paths.checkpoints, paths.best, paths.anomalies):
                clean_up_partial(folder)
        heartbeat = Heartbeat(paths.heartbeat, newest_step(paths.checkpoints), writes=dist.is_rank_zero)
        heartbeat.write(now=True)  # replaces the last words of the previous start
        distributed.barrier()
        check_shared_disk(paths, dist)
        if archived:
            ctx.log(f"fresh start: the older run was moved to {archived}")
        for note in notes:
            ctx.log(note)
        yield heartbeat


def watch_components(trainer: Trainer, state: TrainState) -> ComponentLosses:
    """Collect the losses of every micro-step by the mixture's components, from a hook that is not compiled."""
    assert isinstance(trainer.dataset, MixedDataset)
    components = ComponentLosses(trainer.dataset, trainer.batch, state.data, trainer.ctx.dist.rank)
    model = trainer.model

    def add(*_: object) -> None:
        if model.training and model.token_losses is not None:
            components.add(model.token_losses)

    trainer.train_model.register_forward_hook(add)
    return components


@contextmanager
def start_services(
    trainer: Trainer, state: TrainState, heartbeat: Heartbeat, on_checkpoint: Callable[[int], None], profile: bool
) -> Iterator[Services]:
    """
    Raises:
        UserError: the checkpoints that the run will keep do not fit on the disk.
    """
    ctx, loader, dataset = trainer.ctx, trainer.loader, trainer.dataset
    config, dist, step, max_steps = ctx.config, ctx.dist, state.step, ctx.config.train.max_steps
    tokenizer = dataset.tokenizer()
    heartbeat.step = step
    with ExitStack() as stack:
        stop = stack.enter_context(handle_stop_signals(config.train.max_wall_s, ctx.started))
        bar = stack.enter_context(step_bar(step, max_steps, dist.is_rank_zero))
        vote = StopVote(stop, heartbeat, bar)
        evals = build_evals(ctx, trainer.eval_model, dataset, tokenizer, vote)
        reference = ReferenceWatch(find_reference(to_dict(config)), ctx.metrics.rows() if dist.is_rank_zero else ())
        saver = stack.enter_context(AsyncSaver(config, ctx.paths, trainer.model, trainer.optimizer, tokenizer, dist))
        saver.check_disk_space(step)
        stack.enter_context(Watchdog(ctx, heartbeat, loader, stop))
        if dist.is_rank_zero:
            for tracker in config.train.trackers:
                from myllm.runs.trackers.background import track  # loaded only if used

                stack.enter_context(track(ctx.paths, tracker, ctx.log))
        gc_schedule = stack.enter_context(GcSchedule(step))
        components = watch_components(trainer, state) if isinstance(dataset, MixedDataset) else None
        meter = ThroughputMeter(ctx, loader, step, components)
        profiler = Profiler(ctx, step, meter, profile)
        stack.enter_context(explain_out_of_memory(config, dist))  # innermost: the watchdog records what it says
        yield Services(
            heartbeat, stop, saver, tuple(evals), vote, reference, meter, profiler, gc_schedule, bar, on_checkpoint
        )
