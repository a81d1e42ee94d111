"""Trackers beside a run: each in a process of its own that reads metrics.jsonl, so that none can stop or slow training.

    training ─▶ metrics.jsonl ─▶ tracker's process ─▶ TensorBoard, wandb, ...

The process ends after the run: also if the run was killed, after the last row. `myllm runs sync` does the same for a
run that is over.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

from myllm.errors import UserError
from myllm.files import file_lock
from myllm.paths import RunPaths
from myllm.runs.history import read_config

from .destinations import TRACKERS, view_command
from .rows import NewRows, SentRows

READ_EVERY_S = 1.0
FINISH_S = 30.0
"""How long a run waits at its end for a tracker to store the last rows."""
NICE = 10
LEFT_TO_THE_RUN = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Signals that end the run, and the tracker only after it."""


def sync(run: RunPaths, name: str, wait: Callable[[float], bool] | None = None) -> int:
    """Send a run's rows to a tracker, all that it does not have.

    Args:
        wait: called with READ_EVERY_S before each look at the file; True: the run is over, this look is the last one.
            None: it is over now.

    Returns:
        the number of rows sent.

    Raises:
        UserError: another process sends this run's rows to the tracker.
        Exception: whatever the tracker raises.
    """
    record = run.trackers / f"{name}.json"
    record.parent.mkdir(exist_ok=True)
    try:
        # A killed run's process may still be at its last rows.
        with file_lock(record.with_suffix(".lock"), wait=wait is not None):
            return _send(run, name, SentRows(record), wait or (lambda seconds: True))
    except BlockingIOError:
        raise UserError(f"another process sends the rows of {run.root} to {name}; wait until it has ended") from None


def _send(run: RunPaths, name: str, sent: SentRows, wait: Callable[[float], bool]) -> int:
    tracker_class, rows = TRACKERS[name], NewRows(run.metrics)
    if not tracker_class.keeps_rows:
        sent.last_steps.clear()
    n_sent, over = 0, False
    with closing(tracker_class(run, sent.id, read_config(run.config))) as tracker:
        while not over:
            over = wait(READ_EVERY_S)
            before = n_sent
            for row in rows:
                if figures := sent.take(row):
                    tracker.log(row["step"], figures)
                    n_sent += 1
            if n_sent > before:
                tracker.flush()
                sent.save()
    return n_sent


@contextmanager
def track(run: RunPaths, name: str, log: Callable[[str], None]) -> Iterator[None]:
    """Send a run's rows to a tracker while the `with` block writes them.

    Args:
        log: called from a thread, once if the tracker fails.
    """
    context = get_context("spawn")
    run_is_over, ours = context.Pipe(duplex=False)
    messages, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_follow, args=(run, name, run_is_over, theirs), name=name, daemon=True)
    try:
        process.start()
    except OSError as error:  # no memory for another process
        log(_failure(run, name, error))
        yield
        return
    log(f"tracker {name}: {view_command(name, run)}")
    run_is_over.close()
    theirs.close()

    failures: list[str] = []

    def report_failure() -> None:
        with suppress(EOFError, OSError):
            failures.append(messages.recv())
            log(failures[0])

    listener = threading.Thread(target=report_failure, name=name, daemon=True)
    listener.start()
    try:
        yield
    finally:
        ours.close()
        process.join(FINISH_S)
        if late := process.is_alive():
            process.kill()
        listener.join()
        if late and not failures:
            log(_failure(run, name, TimeoutError(f"it did not take all rows within {FINISH_S:.0f} s")))


def _follow(run: RunPaths, name: str, run_is_over: Connection, messages: Connection) -> None:
    """What a tracker's process does."""
    for signal_name in LEFT_TO_THE_RUN:
        signal.signal(getattr(signal, signal_name), signal.SIG_IGN)
    os.nice(NICE)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(silence, descriptor)
    try:
        sync(run, name, run_is_over.poll)  # a closed pipe, of a killed run too, is ready to be read
    except Exception as error:
        messages.send(_failure(run, name, error))


def _failure(run: RunPaths, name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"the tracker {name} failed: {reason}; training continues. metrics.jsonl has all rows: "
        f"myllm runs sync {run.root.name} --to {name}"
    )
