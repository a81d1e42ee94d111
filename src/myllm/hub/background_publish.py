"""Publishes during training, in a separate process: it may fail, wait or be killed, and training never notices.

The loop submits each checkpoint that is saved and evaluated; the process publishes them in order. At the end `finish`
publishes the newest checkpoint and waits for it, up to FINISH_TIMEOUT_S. An interruption loses nothing: the next start,
or `myllm publish`, asks the Hub what it has and resumes from there.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from myllm.config import HubConfig, RunConfig
from myllm.data.prepare.workers import init_worker
from myllm.errors import UserError
from myllm.paths import RunPaths
from myllm.runs.step_process import StepProcess, Steps

from .client import check_token, create_repo, explain_error, redact_token
from .publish import ExportFolder, LogLine, export_checkpoint, publish, select_checkpoints

ACCESS_CHECK_TIMEOUT_S = 20
"""How long the start of training waits for the Hub."""
FINISH_TIMEOUT_S = 1_800
"""How long the end of training waits for the last upload."""


class Publisher:
    """Takes the steps to publish. Does nothing without a repository or where `active` is false."""

    def __init__(self, config: RunConfig, active: bool, export: ExportFolder) -> None:
        run, self._hub = RunPaths.of(config.name), config.hub
        self._active = active and config.hub.repo is not None
        advice = (
            f"Nothing is lost: the checkpoints are in {run.checkpoints}. To resume publishing: "
            f"myllm publish {run.root.name} --repo {config.hub.repo}"
        )
        self._process = StepProcess("publish", advice, _run_publisher, (run, config.hub, export))

    def submit(self, step: int) -> None:
        """Publish a checkpoint that is saved and evaluated. Returns at once and never raises."""
        if self._active and self._hub.every_checkpoint:
            self._process.send(step)

    def finish(self, step: int) -> None:
        """Publish the newest checkpoint and wait for it, up to FINISH_TIMEOUT_S."""
        if self._active:
            print(f"\n=== Publishing: {self._hub.repo}", flush=True)
            self._process.finish(step, FINISH_TIMEOUT_S)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.stop()


@contextmanager
def background_publisher(
    config: RunConfig, active: bool, export: ExportFolder = export_checkpoint
) -> Iterator[Publisher]:
    """A publisher that stops when the block ends.

    Args:
        active: true on the one rank that publishes.
    """
    publisher = Publisher(config, active, export)
    try:
        yield publisher
    finally:
        publisher.stop()


def check_hub_access(hub: HubConfig, log: LogLine = print) -> None:
    """Check that this account may write to the repository, before hours of training. An unreachable Hub is no error.

    Raises:
        UserError: no token, or a token without write access.
    """
    check_token()
    errors: list[Exception] = []

    def check() -> None:
        try:
            create_repo(hub)
        except Exception as error:
            errors.append(error)

    # In a thread: a network that drops all packets would block it for minutes.
    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(ACCESS_CHECK_TIMEOUT_S)
    if thread.is_alive():
        problem = f"the Hub did not answer within {ACCESS_CHECK_TIMEOUT_S} s"
    elif not errors:
        return
    elif isinstance(errors[0], UserError):
        raise errors[0]
    else:
        problem = explain_error(errors[0], hub)
    log(f"{problem}; training starts, and publishing is tried again later")


def _run_publisher(run: RunPaths, hub: HubConfig, export: ExportFolder, steps: Steps) -> None:
    """The publisher process. Ends after `None`, or with the process that started it."""
    from huggingface_hub.utils import disable_progress_bars

    from myllm.runs.logs import Log

    init_worker()
    os.nice(10)  # training has priority
    disable_progress_bars()
    sys.exit(0 if publish_from_queue(run, hub, export, steps, Log(run.log, active=True)) else 1)


def publish_from_queue(run: RunPaths, hub: HubConfig, export: ExportFolder, steps: Steps, log: LogLine) -> bool:
    """Publish the steps of a queue until it yields None; False if the last attempt failed."""
    published: set[Path] = set()
    success = more = True
    while more:
        submitted = [steps.get()]
        while not steps.empty():
            submitted.append(steps.get())
        more = None not in submitted
        newest = max((step for step in submitted if step is not None), default=None)
        if newest is None:
            continue
        success = False
        try:
            checkpoints = [
                folder
                for folder in select_checkpoints(run, hub.every_checkpoint, up_to=newest)
                if folder not in published
            ]
            publish(run, checkpoints, hub, export, log)
            published.update(checkpoints)
            success = True
        except UserError as error:
            log(f"publishing stopped for now: {error}")
        except Exception as error:  # a bug, which must not disturb the run
            log(f"publishing failed: {type(error).__name__}: {redact_token(str(error))}")
    return success
