"""What a run is doing right now, in a file that anyone may read: `heartbeat.json` in its folder.

    step, doing       training, evaluating, saving, waiting for data, starting; or ended
    time              when the file was written, seconds since 1970
    progress_time     when the loop last got on: a step, a batch of an evaluation
    pid, host         of rank 0
    how, exit_code    once it has ended: in words, and the code that it exits with without torchrun

It is replaced in one step, at most every EVERY_S seconds. If it cannot be written, training goes on without.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from myllm.checkpoint.layout import newest_step
from myllm.errors import UserError
from myllm.files import atomic_write, file_lock, read_json
from myllm.migrations import HEARTBEAT
from myllm.paths import RunPaths, runs_dir, user_path, warn_if_ambiguous

EVERY_S = 2.0
AT_WORK, SILENT = 3, 1
"""Exit codes of `myllm status` for a run that has not ended by itself."""


class Heartbeat:
    """How far the loop is. The loop sets it, other threads read it: each value is set in one step."""

    def __init__(self, path: Path, step: int = 0, writes: bool = True) -> None:
        self.step, self.doing_now, self.marks = step, "starting", 0
        self.first_step_done = False
        self.ending: tuple[str, int] | None = None
        self.unwritable: str | None = None
        self._path, self._writes, self._written = path, writes, 0.0
        self._progress_time = time.time()

    def mark(self) -> None:
        """The loop got on."""
        self.marks += 1
        self._progress_time = time.time()

    def reached(self, step: int) -> None:
        """A step boundary: `step` updates are complete."""
        self.first_step_done = self.first_step_done or (self.doing_now == "training" and step > self.step)
        self.step, self.doing_now = step, "training"
        self.mark()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Something else than training, for the length of a `with` block."""
        before, self.doing_now = self.doing_now, what
        self.mark()
        try:
            yield
        finally:
            self.doing_now = before
            self.mark()

    def end(self, how: str, exit_code: int) -> None:
        """The last word."""
        self.ending = (how, exit_code)
        self.write(now=True)

    def write(self, now: bool = False) -> None:
        """Replace the file if it is time. Whatever keeps it from being written is remembered and costs nothing else."""
        if not self._writes or (not now and time.monotonic() - self._written < EVERY_S):
            return
        self._written = time.monotonic()
        try:
            # Not flushed to the disk, as checkpoints are: after a power cut its word would be out of date anyway.
            with atomic_write(self._path, durable=False) as file:
                file.write(json.dumps(self._values()).encode() + b"\n")
            self.unwritable = None
        except OSError as error:
            self.unwritable = f"cannot write {self._path}: {error.strerror}; training goes on without it"

    def _values(self) -> dict[str, Any]:
        doing = "ended" if self.ending else self.doing_now
        how, code = self.ending or (None, None)
        return HEARTBEAT.stamp({
            "step": self.step, "doing": doing, "time": time.time(), "progress_time": self._progress_time,
            "pid": os.getpid(), "host": socket.gethostname(), "how": how, "exit_code": code,
        })  # fmt: skip


@contextmanager
def report_starting(run: RunPaths, active: bool) -> Iterator[Callable[[], None]]:
    """Say that a run is being started, while its data are looked for, so that nobody takes the end of an earlier start
    for its state. If an error ends the `with` block before the loop has its own last word, that is the last word.

    Args:
        active: on the one process of the run that writes its heartbeat.

    Yields:
        call it when the loop takes over.
    """
    taken_over = threading.Event()
    if not active or not _is_free(run):
        yield taken_over.set
        return
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
        if _is_open(run.heartbeat):
            codes = {UserError: 2, KeyboardInterrupt: 130}
            code = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else code
            beat.end(f"failed: {str(error) or type(error).__name__}", code)
        raise
    finally:
        take_over()


def _is_free(run: RunPaths) -> bool:
    """Whether the run's folder is there and no process trains in it."""
    try:
        with file_lock(run.root / ".lock", wait=False):
            return True
    except (OSError, UserError):
        return False


def _is_open(path: Path) -> bool:
    """Whether this process has written a heartbeat, and not its end."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return said["pid"] == os.getpid() and said["host"] == socket.gethostname() and said["how"] is None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def status(run: str, silent_s: float) -> tuple[str, int]:
    """One line about a run, and the exit code that says the same.

    Returns:
        the line, and: after its end the code that the run exits with without torchrun (0 complete, 75 to be started
        again, 130 and 143 stopped by SIGINT and SIGTERM, 1 and 2 failed); AT_WORK; SILENT, where its process is gone
        without a last word, or where the loop has not got on for `silent_s` seconds.

    Raises:
        UserError: no such run, or one without a heartbeat.
    """
    folders = [each for each in (user_path(run), runs_dir() / run) if each.is_dir()]
    # A folder here that has the run's name need not be one.
    folder = next((each for each in folders if RunPaths(each).heartbeat.is_file()), None)
    if folder is None:
        expected = RunPaths(folders[-1] if folders else runs_dir() / run).heartbeat
        raise UserError(f"no heartbeat of a run {run!r}: expected {expected}")
    warn_if_ambiguous(run, folder, runs_dir() / run)
    path = RunPaths(folder).heartbeat
    try:
        said = HEARTBEAT.upgrade(read_json(path), path)
        word, *more = str(said["how"] or said["doing"]).splitlines() or [""]
        line = f"step {said['step']:,}: {word}" + (" ..." if more else "")
        if said["doing"] == "ended":
            return line, int(said["exit_code"])
        idle = time.time() - said["progress_time"]
        where = f"process {said['pid']} on {said['host']}"
        if said["host"] == socket.gethostname() and not _is_alive(said["pid"]):
            return f"{line}; but {where} is gone, without a last word", SILENT
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no heartbeat ({error!r})") from None
    if idle > silent_s:
        return f"{line}; but it has not got on for {idle:,.0f} s ({where})", SILENT
    return f"{line}, {max(idle, 0):,.0f} s ago ({where})", AT_WORK


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
