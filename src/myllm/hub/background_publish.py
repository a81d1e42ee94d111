"""Publishing while training goes on, in a process of its own: it can fail, wait and be killed, and training does not
notice.

The loop says which steps are saved and evaluated (`submit`); the process publishes them, one after the other. When all
is done, `finish` has the newest published and waits for it where people can see it, but not for ever. Nothing is lost
by an end in the middle: the next start, or `myllm publish`, asks the Hub what it has and goes on from there.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path

from myllm.config import HubConfig, RunConfig
from myllm.data.prepare.work_items import init_worker
from myllm.errors import UserError
from myllm.paths import RunPaths

from . import publish as publishing
from .publish import ExportFolder

ACCESS_CHECK_TIMEOUT_S = 20
"""How long the start of a training waits for the Hub."""
FINISH_TIMEOUT_S = 1_800
"""How long the end of a training waits for the last upload."""
STATUS_EVERY_S = 30


class Publisher:
    """Where the loop hands over what is to be published. Without a repository, or on other ranks, it does nothing."""

    def __init__(self, config: RunConfig, active: bool, make_folder: ExportFolder) -> None:
        self._run, self._hub = RunPaths.of(config.name), config.hub
        self._active, self._make_folder = active and config.hub.repo is not None, make_folder
        self._process: BaseProcess | None = None
        self._steps: Queue[int | None] | None = None

    def submit(self, step: int) -> None:
        """A checkpoint is there and what is measured at its step too. Returns at once, whatever happens."""
        if self._active and self._hub.every_checkpoint:
            self._send(step)

    def finish(self, step: int) -> None:
        """Have the newest checkpoint published and wait for it, within reason."""
        if not self._active:
            return
        print(f"\n=== Publishing: {self._hub.repo}", flush=True)
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        for _ in range(2):  # once more if the process was killed, now or before
            self._send(step)
            if self._process is None or self._steps is None:
                return  # said by _send
            self._steps.put(None)
            self._wait(self._process, deadline)
            if (self._process.exitcode or 0) >= 0:
                break
        if self._process.is_alive():
            print(f"not published within {FINISH_TIMEOUT_S / 60:.0f} minutes. {self._advice()}", flush=True)
        elif self._process.exitcode:
            print(f"not published: see above. {self._advice()}", flush=True)

    def _wait(self, process: BaseProcess, deadline: float) -> None:
        started = told = time.monotonic()
        while process.is_alive() and (now := time.monotonic()) < deadline:
            process.join(0.5)
            if now - told > STATUS_EVERY_S:
                told = now
                print(
                    f"still publishing, for {(now - started) / 60:.1f} minutes now; Ctrl-C leaves it for later",
                    flush=True,
                )

    def stop(self) -> None:
        """End what is under way."""
        if self._steps is not None:
            self._steps.cancel_join_thread()
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _send(self, step: int) -> None:
        try:
            if self._process is None or not self._process.is_alive():
                context = get_context("spawn")
                self._steps = context.Queue()
                self._process = context.Process(
                    target=_run_publisher,
                    args=(self._run, self._hub, self._make_folder, self._steps),
                    name="publisher",
                )
                self._process.start()
            if self._steps is not None:
                self._steps.put(step)
        except Exception as error:  # no memory for another process, say: the run is worth more than its copy
            print(f"cannot publish step {step:,}: {error}. {self._advice()}", flush=True)

    def _advice(self) -> str:
        return (
            f"Nothing is lost: the checkpoints are in {self._run.checkpoints}, and this goes on from where it was: "
            f"myllm publish {self._run.root.name} --repo {self._hub.repo}"
        )


@contextmanager
def background_publisher(
    config: RunConfig, active: bool, make_folder: ExportFolder = publishing.export_checkpoint
) -> Iterator[Publisher]:  # fmt: skip
    """Training publishes through what this gives.

    Args:
        active: on the one process of the run that publishes.
    """
    publisher = Publisher(config, active, make_folder)
    try:
        yield publisher
    finally:
        publisher.stop()


def check_hub_access(hub: HubConfig, say: publishing.LogLine = print) -> None:
    """Before the hours of training: may this account write there? A Hub that cannot be asked now is no obstacle.

    Raises:
        UserError: no token, or one that may not.
    """
    publishing.check_token()
    found: list[Exception] = []

    def ask() -> None:
        try:
            publishing.create_repo(hub)
        except Exception as error:
            found.append(error)

    # In a thread, since a network that swallows everything may keep it for minutes.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ACCESS_CHECK_TIMEOUT_S)
    if asking.is_alive():
        say(
            f"the Hub did not answer within {ACCESS_CHECK_TIMEOUT_S} s; training starts, "
            "and publishing is tried again later"
        )
    elif found and isinstance(found[0], UserError):
        raise found[0]
    elif found:
        say(f"{publishing.explain_error(found[0], hub)}; training starts, and publishing is tried again later")


def _run_publisher(run: RunPaths, hub: HubConfig, make_folder: ExportFolder, steps: "Queue[int | None]") -> None:
    """What the process beside does, until it is told that nothing more comes. Ends with the one that started it."""
    from huggingface_hub.utils import disable_progress_bars

    from myllm.runs.logs import Log

    init_worker()
    os.nice(10)  # training goes first
    disable_progress_bars()
    sys.exit(0 if publish_from_queue(run, hub, make_folder, steps, Log(run.log, active=True)) else 1)


def publish_from_queue(
    run: RunPaths, hub: HubConfig, make_folder: ExportFolder, steps: "Queue[int | None]", say: publishing.LogLine
) -> bool:
    """Publish what comes through `steps` until None does. Whether all that was wanted last is there."""
    done: set[Path] = set()
    fine = more = True
    while more:
        offered = [steps.get()]
        while not steps.empty():
            offered.append(steps.get())
        more = None not in offered
        newest = max((step for step in offered if step is not None), default=None)
        if newest is None:
            continue
        fine = False
        try:
            found = [
                folder
                for folder in publishing.select_checkpoints(run, hub.every_checkpoint, newest)
                if folder not in done
            ]
            publishing.publish(run, found, hub, make_folder, say)
            done.update(found)
            fine = True
        except UserError as error:
            say(f"publishing gives up for now: {error}")
        except Exception as error:  # a fault of ours, which is no reason to be a burden to the run
            say(f"publishing failed: {type(error).__name__}: {publishing.redact_token(str(error))}")
    return fine
