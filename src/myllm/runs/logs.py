"""What a run says about itself: rows of JSON for programs, lines for people, and the environment it ran in."""

import io
import json
import math
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from myllm import paths
from myllm.distributed.device_info import device_name
from myllm.distributed.standard_streams import output_failures
from myllm.files import json_safe, read_rows, write_text

TRAINING = "training"
"""What a stopwatch counts unless it is told otherwise."""


class JsonlFile:
    """An append-only file of one JSON object a line, flushed at each row."""

    def __init__(self, path: Path, say: Callable[[str], None] | None = None) -> None:
        """
        Args:
            say: told once if the file cannot be written; rows then wait until it can. None: OSError is raised.
        """
        self.path = path
        self._file = LineFile(path, say)

    def append(self, row: dict[str, Any]) -> None:
        self._file.append(json.dumps(json_safe(row), ensure_ascii=False))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row; what is none is left out, such as a last line cut by a crash."""
        if not self.path.is_file():
            return
        yield from (row for row in read_rows(self.path) if row is not None)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the other rows, in one step: what came after the checkpoint that a run resumes from."""
        if self.path.is_file():
            write_text(
                self.path,
                "".join(json.dumps(json_safe(row), ensure_ascii=False) + "\n" for row in self.rows() if wanted(row)),
            )


class Log:
    """Lines for people: on the terminal and, with the time, in the run's log.txt. Silent on ranks other than 0.

    Where one of the two cannot be written, the other says so, once.
    """

    def __init__(self, path: Path, active: bool) -> None:
        self._active = active
        self._file = LineFile(path, self._show)
        self._told: set[str] = set()

    def __call__(self, line: str) -> None:
        if not self._active:
            return
        self._show(line)
        self._keep(line)
        for name, reason in output_failures():
            if name not in self._told:
                self._told.add(name)
                self._keep(f"{name} cannot be written: {reason}; training goes on, and this file has what it says")

    def _show(self, line: str) -> None:
        # Above a progress bar rather than through it.
        from tqdm import tqdm

        tqdm.write(_wrapped(line) if sys.stdout.isatty() else line)
        sys.stdout.flush()

    def _keep(self, line: str) -> None:
        self._file.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")


def _wrapped(line: str) -> str:
    """A line cut between words for the terminal's width; what goes to a file or a pipe stays one line."""
    width = shutil.get_terminal_size().columns
    parts = line.split("\n")
    options = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(part, width, **options) if len(part) > width else part for part in parts)


class Stopwatch:
    """Where the time goes: to training, but for what is counted apart under a name of its own. One thing at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._doing, self._lapped = device, TRAINING, 0.0
        self.seconds: Counter[str] = Counter()
        """By what was being done, until it last changed."""
        self._synchronize()
        self._since = time.perf_counter()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Count the `with` block under this name. Blocks nest: the inner one's time is not the outer one's."""
        self._count()
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._count()
            self._doing = before

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        self._count()
        seconds, self._lapped = self.seconds[TRAINING] - self._lapped, self.seconds[TRAINING]
        return seconds

    def _count(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        self.seconds[self._doing] += now - self._since
        self._since = now

    def _synchronize(self) -> None:
        # Work on an accelerator is only queued when a call returns.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Where a run ran, so that its numbers can be placed."""
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


KEPT_LINES = 10_000
"""Of a file that cannot be written now: as many wait in memory; older ones are lost."""


class LineFile:
    """A file that grows by whole lines, each on its way at once.

    Where lines cannot be written (a full disk, a quota, rights that were taken away), `say` is told once, and they wait
    in memory until they can be. Without `say`, OSError is raised.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None) -> None:
        self.path, self._say = path, say
        self._waiting: deque[str] = deque(maxlen=KEPT_LINES)
        self._failed = False

    def append(self, line: str) -> None:
        self._waiting.append(line)
        failure = self._write()
        if self._say is None:
            if failure is not None:
                raise failure
            return
        if failure is None and self._failed:
            self._failed = False
            self._say(f"{self.path} can be written again")
        elif failure is not None and not self._failed:
            self._failed = True
            reason = failure.strerror or str(failure)
            self._say(f"cannot write {self.path}: {reason}; training goes on, and its lines are kept for later")

    def _write(self) -> OSError | None:
        """Write what waits, all of it or nothing: half a line would spoil the next one too."""
        data = "".join(f"{line}\n" for line in self._waiting).encode("utf-8", "backslashreplace")
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
        self._waiting.clear()
        return None


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
