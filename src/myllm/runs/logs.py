"""Writes the logs of a run: rows of metrics.jsonl, lines for people, a stopwatch, and the environment it ran in."""

import io
import json
import math
import platform
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from myllm import paths
from myllm.distributed.device_info import device_name, synchronize
from myllm.distributed.standard_streams import output_failures
from myllm.distributed.terminal import print_line
from myllm.files import json_safe, read_rows, write_text

TRAINING = "training"
"""Activity of a stopwatch outside `timed` blocks."""
BUFFERED_LINES = 10_000
"""Lines kept in memory while their file cannot be written; older ones are lost."""


class JsonlFile:
    """An append-only file with one JSON object per line."""

    def __init__(self, path: Path, log: Callable[[str], None] | None = None) -> None:
        """
        Args:
            log: called once if the file cannot be written; rows are then kept until it can. None: raise OSError.
        """
        self.path = path
        self._file = LineFile(path, log)

    def append(self, row: dict[str, Any]) -> None:
        self._file.append(json.dumps(json_safe(row), ensure_ascii=False))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All valid rows; invalid ones, such as a last line cut off by a crash, are skipped."""
        if not self.path.is_file():
            return
        yield from (row for row in read_rows(self.path) if row is not None)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop all other rows, atomically."""
        if self.path.is_file():
            write_text(
                self.path,
                "".join(json.dumps(json_safe(row), ensure_ascii=False) + "\n" for row in self.rows() if wanted(row)),
            )


class Log:
    """Prints lines and appends them, with the time, to the run's log.txt. Does nothing on ranks other than 0.

    If one of the two cannot be written, the other says so once.
    """

    def __init__(self, path: Path, active: bool) -> None:
        self._active = active
        self._file = LineFile(path, print_line)
        self._reported: set[str] = set()

    def __call__(self, line: str) -> None:
        if not self._active:
            return
        print_line(line)
        self._append(line)
        for name, reason in output_failures():
            if name not in self._reported:
                self._reported.add(name)
                self._append(f"{name} cannot be written: {reason}; training continues, and so does this file")

    def _append(self, line: str) -> None:
        self._file.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")


class Stopwatch:
    """Measures how long a process spends on training and on each other activity, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._activity, self._lapped = device, TRAINING, 0.0
        self.seconds = cast(dict[str, float], Counter())
        """By activity, without the time since the last change of activity."""
        synchronize(self._device)
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Measure a `with` block as this activity. Blocks nest: inner blocks do not count for outer ones."""
        self._count()
        before, self._activity = self._activity, activity
        try:
            yield
        finally:
            self._count()
            self._activity = before

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        self._count()
        seconds, self._lapped = self.seconds[TRAINING] - self._lapped, self.seconds[TRAINING]
        return seconds

    def _count(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._activity] += now - self._since
        self._since = now


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Software and hardware of a run, for environment.json."""
    packages = ("torch", "numpy", "tiktoken", "datasets", "huggingface_hub", "matplotlib", "pyarrow", "tyro")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["python", *sys.argv],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": device_name(device),
        "world_size": world_size,
        "cpu_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", "-C", str(paths.project_root()), *arguments), capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class LineFile:
    """Appends whole lines to a file, unbuffered, from any thread.

    If lines cannot be written (full disk, quota, permissions), `log` is called once, and they are kept in memory until
    they can be. Without `log`, OSError is raised.
    """

    def __init__(self, path: Path, log: Callable[[str], None] | None) -> None:
        self.path, self._log = path, log
        self._pending: deque[str] = deque(maxlen=BUFFERED_LINES)
        self._failed = False
        # Reentrant: a signal handler may log while its own thread writes.
        self._lock = threading.RLock()

    def append(self, line: str) -> None:
        with self._lock:
            self._pending.append(line)
            failure = self._write()
        if self._log is None:
            if failure is not None:
                raise failure
            return
        if failure is None and self._failed:
            self._failed = False
            self._log(f"{self.path} can be written again")
        elif failure is not None and not self._failed:
            self._failed = True
            reason = failure.strerror or str(failure)
            self._log(f"cannot write {self.path}: {reason}; training continues, and its lines are kept for later")

    def _write(self) -> OSError | None:
        """Write all pending lines or nothing: half a line would spoil the next one."""
        data = "".join(f"{line}\n" for line in self._pending).encode("utf-8", "backslashreplace")
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    _write_all(file, data)
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            return error
        self._pending.clear()
        return None


def _write_all(file: io.FileIO, data: bytes) -> None:
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]
