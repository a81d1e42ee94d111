"""Publishes during training, in a separate process: it may fail, wait or be killed, and training never notices.

The loop submits each checkpoint that is saved and evaluated; the process publishes them in order. At the end `finish`
publishes the newest checkpoint and waits for it, up to half an hour. An interruption loses nothing: the next start,
or `myllm publish`, asks the Hub what it has and resumes from there.
"""

import threading
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path

from myllm.config import HubConfig, RunConfig
from myllm.errors import UserError
from myllm.paths import RunPaths
from myllm.runs.step_process import StepProcess, take_steps

from .client import check_token, create_repo, explain_error, redact_token
from .publish import ExportFolder, LogLine, export_checkpoint, publish, select_checkpoints

ACCESS_CHECK_TIMEOUT_S = 20
"""How long the start of training waits for the Hub."""


def background_publisher(config: RunConfig, active: bool, export: ExportFolder = export_checkpoint) -> StepProcess:
    """The process that publishes the checkpoints it is sent, if the run has a repository.

    Args:
        active: true on the one rank that publishes.
    """
    run, hub = RunPaths.of(config.name), config.hub
    advice = (
        f"Nothing is lost: the checkpoints are in {run.checkpoints}. To resume publishing: "
        f"myllm publish {run.root.name} --repo {hub.repo}"
    )
    work, repo = partial(_work, run, hub, export), hub.repo if active else None
    return StepProcess("publish", repo, work, advice, last_only=not hub.every_checkpoint)


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


def _work(run: RunPaths, hub: HubConfig, export: ExportFolder, steps: Queue) -> bool:
    from huggingface_hub.utils import disable_progress_bars

    from myllm.runs.logs import Log

    disable_progress_bars()
    return publish_from_queue(run, hub, export, steps, Log(run.log, active=True))


def publish_from_queue(run: RunPaths, hub: HubConfig, export: ExportFolder, steps: Queue, log: LogLine) -> bool:
    """Publish the steps of a queue until it yields None; False if the last attempt failed."""
    published: set[Path] = set()
    success = more = True
    while more:
        submitted = take_steps(steps)
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
