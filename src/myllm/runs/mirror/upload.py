"""Copies new checkpoints to the mirror in a process beside training, which never waits for it and never fails with it.

Rank 0 sends the step of each complete checkpoint. The process then brings the mirror up to date with the disk: the
newest checkpoint first, each one's manifest last, and then removes what retention would remove. After a failure, which
is logged once, it tries again by itself and with each new checkpoint.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from myllm.checkpoint.layout import list_checkpoints, step_dir_name, step_of
from myllm.checkpoint.retention import RetentionPolicy
from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.formatting import format_bytes
from myllm.paths import RunPaths
from myllm.runs.logs import Log
from myllm.runs.step_process import StepProcess, take_steps

from .store import LocalDamage, MirrorStore, describe, local_manifest

STOP_TIMEOUT_S = 60
"""How long a run that was asked to stop waits for its last copy: whoever asked may not wait longer."""
RETRY_S = 60
"""Time between attempts while the mirror cannot be written."""


def background_mirror(config: RunConfig, active: bool) -> StepProcess:
    """The process that copies the checkpoints it is sent, if the run has a mirror.

    Args:
        active: true on rank 0.
    """
    checkpoints, url = RunPaths.of(config.name).checkpoints, config.checkpoint.mirror
    advice = f"Nothing is lost: the checkpoints are in {checkpoints}. To mirror them, run the same command again"
    process = StepProcess("mirror", url if active else None, partial(_work, config), advice)
    process.submit(0)  # a mirror that cannot be written is reported now, not after the first checkpoint
    return process


def stop_timeout_s(started: float, max_wall_s: float | None) -> float:
    """How long a run that has to stop may wait for its last copy.

    Args:
        started: when the process began, by the monotonic clock.
        max_wall_s: its limit, as in `train.max_wall_s`.
    """
    left = STOP_TIMEOUT_S if max_wall_s is None else started + max_wall_s - time.monotonic()
    return max(0, min(STOP_TIMEOUT_S, left))


def _work(config: RunConfig, steps: Queue) -> bool:
    run, url = RunPaths.of(config.name), config.checkpoint.mirror
    assert url is not None
    policy = RetentionPolicy(config.train.keep_last, config.train.keep_every_steps)
    # No bars and warnings for each file in the terminal of training. Failures are logged.
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    if url.startswith("hf://"):
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils.logging import set_verbosity_error

        disable_progress_bars()
        set_verbosity_error()
    return mirror_from_queue(run, url, policy, steps, Log(run.log, active=True))


def mirror_from_queue(
    run: RunPaths, url: str, policy: RetentionPolicy, steps: Queue, log: Callable[[str], None]
) -> bool:
    """Mirror the steps of a queue until it yields None; False if the last attempt failed."""
    newest, failed, more = 0, False, True
    uploads = _Uploads(run, url, policy, log)
    while more:
        submitted = take_steps(steps, timeout=RETRY_S if failed else None)
        more = None not in submitted
        newest = max(newest, *(step for step in submitted if step is not None), 0)
        try:
            uploads.sync(newest)
        except Exception as error:  # whatever a file system does must not disturb the run
            if not failed:
                reason = str(error) if isinstance(error, UserError) else describe(error)
                log(f"the mirror {url} cannot be written: {reason}; training continues, and so do the attempts")
            failed = True
        else:
            if failed:
                log(f"the mirror {url} is up to date again")
            failed = False
    return not failed


class _Uploads:
    """Brings the mirror up to date."""

    def __init__(self, run: RunPaths, url: str, policy: RetentionPolicy, log: Callable[[str], None]) -> None:
        self._run, self._url, self._policy, self._log = run, url, policy, log
        self._damaged: set[Path] = set()

    def sync(self, newest: int) -> None:
        """Copy the checkpoints up to a step, and the run's small files."""
        store = MirrorStore(self._url, self._run)  # new each time: credentials may have come, a disk be mounted
        if newest == 0:
            store.check_writable()
        saved = [folder for folder in list_checkpoints(self._run.checkpoints) if step_of(folder) <= newest]
        self._sync_kind(store, "checkpoints", saved, self._policy)
        best = list_checkpoints(self._run.best)[:1] if newest else []
        self._sync_kind(store, "best", best, RetentionPolicy(newest_only=True))
        store.upload_run_files()

    def _sync_kind(self, store: MirrorStore, kind: str, saved: list[Path], policy: RetentionPolicy) -> None:
        """
        Args:
            saved: the checkpoints to copy, newest first.
        """
        if not saved:
            return
        mirrored = store.checkpoints(kind)
        whole, new = {step for step, manifest in mirrored.items() if manifest}, step_of(saved[0])
        for step in mirrored.keys() - whole:  # cut short: it takes the space of the next one
            store.remove(kind, step)
        for folder in saved:
            step = step_of(folder)
            wanted = folder.name == step_dir_name(step) and step not in policy.superseded({*whole, step}, new)
            if wanted and self._copy(store, kind, folder, mirrored.get(step)):
                whole.add(step)
        if new in whole:
            for step in policy.superseded(whole, new):
                store.remove(kind, step)

    def _copy(self, store: MirrorStore, kind: str, folder: Path, mirrored: dict[str, Any] | None) -> bool:
        """Copy a checkpoint unless the mirror has it. False if it is damaged, or was deleted meanwhile."""
        if folder in self._damaged:
            return False
        started = time.monotonic()
        try:
            if mirrored == local_manifest(folder):
                return True
            n_bytes = store.upload(kind, folder)
        except Exception as error:
            if not folder.is_dir():  # newer ones have replaced it
                return False
            if not isinstance(error, LocalDamage):
                raise
            self._damaged.add(folder)
            self._log(f"{folder} is not mirrored: {error}")
            return False
        seconds = time.monotonic() - started
        self._log(f"mirrored step {step_of(folder):,} to {store.url}/{kind} ({format_bytes(n_bytes)}, {seconds:.0f} s)")
        return True
