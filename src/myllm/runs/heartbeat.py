"""The current state of a run, in a file that other programs may read: `heartbeat.json` in its folder.

    step, doing       training, evaluating, saving, waiting for data, starting; or ended
    time              when the file was written, in seconds since 1970
    progress_time     when the loop last made progress: a step, or a batch of an evaluation
    pid, host         of rank 0
    how, exit_code    after the end: the reason, and the exit code of the process without torchrun

The file is replaced atomically, at most every EVERY_S seconds. If it cannot be written, training continues.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from myllm.checkpoint.layout import newest_step
from myllm.errors import UserError
from myllm.files import atomic_write, read_json, write_json
from myllm.migrations import HEARTBEAT
from myllm.paths import RunPaths, runs_dir, user_path, warn_if_ambiguous

from .history import read_json_or_empty

EVERY_S = 2.0
RUNNING, NOT_RESPONDING = 3, 1
"""Exit codes of `myllm status` for a run that has not ended."""
STOPPED = (75, 129, 130, 131, 143)
"""Exit codes of a run that was asked to stop, and has saved."""
SILENT_S = 600.0
"""A run that makes no progress for so long is not responding."""


class Heartbeat:
    """Progress of the loop, which sets it. Other threads read it; each value is set atomically."""

    def __init__(self, path: Path, step: int = 0, writes: bool = True) -> None:
        self.step, self.doing_now, self.marks = step, "starting", 0
        self.first_step_done = False
        self.ending: tuple[str, int] | None = None
        self.unwritable: str | None = None
        self._path, self._writes, self._written_at = path, writes, 0.0
        self._progress_time = time.time()

    def mark(self) -> None:
        """Record progress of the loop."""
        self.marks += 1
        self._progress_time = time.time()

    def reached(self, step: int) -> None:
        """Record that `step` steps are complete."""
        self.first_step_done = self.first_step_done or (self.doing_now == "training" and step > self.step)
        self.step, self.doing_now = step, "training"
        self.mark()

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Record another activity than training, during a `with` block."""
        before, self.doing_now = self.doing_now, activity
        self.mark()
        try:
            yield
        finally:
            self.doing_now = before
            self.mark()

    def end(self, how: str, exit_code: int) -> None:
        """Record the end of the run."""
        self.ending = (how, exit_code)
        self.write(now=True)

    def write(self, now: bool = False) -> None:
        """Replace the file if it is due. An error is kept in `unwritable`."""
        if not self._writes or (not now and time.monotonic() - self._written_at < EVERY_S):
            return
        self._written_at = time.monotonic()
        try:
            # Not flushed to the disk: after a power failure it would be out of date anyway.
            with atomic_write(self._path, durable=False) as file:
                file.write(json.dumps(self._values()).encode() + b"\n")
            self.unwritable = None
        except OSError as error:
            self.unwritable = f"cannot write {self._path}: {error.strerror}; training continues without it"

    def _values(self) -> dict[str, Any]:
        doing = "ended" if self.ending else self.doing_now
        how, code = self.ending or (None, None)
        return HEARTBEAT.stamp({
            "step": self.step, "doing": doing, "time": time.time(), "progress_time": self._progress_time,
            "pid": os.getpid(), "host": socket.gethostname(), "how": how, "exit_code": code,
        })  # fmt: skip


@contextmanager
def report_starting(run: RunPaths, active: bool) -> Iterator[Callable[[], None]]:
    """Write a heartbeat while a run starts and looks for its data. If the block fails and the loop has not recorded
    that, record it as the end of the run; but a run that was complete, and whose new start is refused, stays complete.

    Args:
        active: true for the one process of the run that writes its heartbeat.

    Yields:
        a function to call when the loop takes over.

    Raises:
        UserError: another process is training in the folder.
    """
    taken_over = threading.Event()
    if not active or not run.root.is_dir():
        yield taken_over.set
        return
    from .run_dir import claim_run  # loads torch, which `myllm status` does without

    with claim_run(run):
        pass  # now rather than after the preparation of data
    before = read_json_or_empty(run.heartbeat)
    beat = Heartbeat(run.heartbeat, newest_step(run.checkpoints))

    def write() -> None:
        while not taken_over.is_set():
            beat.mark()
            beat.write(now=True)
            taken_over.wait(EVERY_S)

    thread = threading.Thread(target=write, name="heartbeat", daemon=True)
    thread.start()

    def take_over() -> None:
        taken_over.set()
        thread.join()

    try:
        yield take_over
    except BaseException as error:
        take_over()
        current = read_json_or_empty(run.heartbeat)
        is_ours = (current.get("pid"), current.get("host")) == (os.getpid(), socket.gethostname())
        refused = isinstance(error, UserError) and current.get("doing") == "starting"
        if refused and before.get("exit_code") == 0 and before.get("step") == current.get("step"):
            with suppress(OSError):
                write_json(run.heartbeat, before)
        elif is_ours and current["how"] is None:
            codes = {UserError: 2, KeyboardInterrupt: 130}
            code = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else code
            beat.end(f"failed: {str(error) or type(error).__name__}", code)
        raise
    finally:
        take_over()


class RunState(NamedTuple):
    """What a heartbeat says about its run."""

    word: str
    """running, complete, stopped, failed, died or not responding."""
    line: str
    exit_code: int


def status(run: str, silent_s: float) -> tuple[str, int]:
    """Describe a run's state in one line, and as an exit code.

    Returns:
        the line and the exit code. After the end of the run: the exit code of its process without torchrun (0 complete,
        75 to be started again, 130 and 143 stopped by SIGINT and SIGTERM, 1 and 2 failed). Otherwise RUNNING; or
        NOT_RESPONDING if its process is gone, or the loop has made no progress for `silent_s` seconds.

    Raises:
        UserError: no such run, or no valid heartbeat.
    """
    folders = [folder for folder in (user_path(run), runs_dir() / run) if folder.is_dir()]
    # A folder of that name in the current folder need not be a run.
    folder = next((folder for folder in folders if RunPaths(folder).heartbeat.is_file()), None)
    if folder is None:
        expected = RunPaths(folders[-1] if folders else runs_dir() / run).heartbeat
        raise UserError(f"no heartbeat of run {run!r}: expected {expected}")
    warn_if_ambiguous(run, folder, runs_dir() / run)
    _, line, exit_code = read_state(RunPaths(folder).heartbeat, silent_s)
    return line, exit_code


def read_state(path: Path, silent_s: float = SILENT_S) -> RunState:
    """The state of the run that writes the heartbeat `path`, as `status` describes it.

    Raises:
        UserError: not a valid heartbeat.
        OSError: it cannot be read.
    """
    values = HEARTBEAT.upgrade(read_json(path), path)
    try:
        word, *more = str(values["how"] or values["doing"]).splitlines() or [""]
        line = f"step {values['step']:,}: {word}" + (" ..." if more else "")
        if values["doing"] == "ended":
            code = int(values["exit_code"])
            return RunState("complete" if code == 0 else "stopped" if code in STOPPED else "failed", line, code)
        idle_s = time.time() - values["progress_time"]
        process = f"process {values['pid']} on {values['host']}"
        gone = values["host"] == socket.gethostname() and not _is_alive(values["pid"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid heartbeat ({error!r})") from None
    if gone:
        return RunState("died", f"{line}; but {process} exited without recording why", NOT_RESPONDING)
    if idle_s > silent_s:
        line = f"{line}; but it is not responding: no progress for {idle_s:,.0f} s ({process})"
        return RunState("not responding", line, NOT_RESPONDING)
    return RunState("running", f"{line}, {max(idle_s, 0):,.0f} s ago ({process})", RUNNING)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
