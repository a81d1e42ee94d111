"""What a program says to people, and that it never ends a run.

A terminal goes away, the reader of a pipe leaves, the disk behind a log is full, or there is no output at all (`>&-`):
training goes on, and says once, where it still can, what was lost. Letters that a terminal cannot show are escaped.
"""

import io
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

STREAMS = ("stdout", "stderr")
DRAIN_S = 1.0
"""How long a terminal that another program has made non-blocking may take to accept a line."""
KEPT_LINES = 10_000
"""Of a file that cannot be written now: as many wait in memory; older ones are lost."""


def open_output(keep_going: bool = False) -> None:
    """Make this process's standard streams safe to write to; the first thing that a program does.

    Args:
        keep_going: drop what stdout cannot take, instead of raising OSError. stderr always does.
    """
    # A closed descriptor's number goes to the next file that is opened, and then messages are written into that file.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # somebody has read from it: it is theirs
            sys.stdin.reconfigure(errors="surrogateescape")  # as of file names: what is no text ends no conversation
    for number, name in enumerate(STREAMS, start=1):
        stream = getattr(sys, name)
        ours = stream is getattr(sys, f"__{name}__")  # not a notebook's, nor a test's
        if stream is None or (ours and (keep_going or name == "stderr")):
            setattr(sys, name, _dropping(number, stream))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def warn(line: str) -> None:
    """Say something beside a command's output."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def flush_output() -> str | None:
    """Write what stdout still holds. Returns why that cannot be; what is left then goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


def reader_left() -> bool:
    """Whether what reads this program's output, such as `head`, has had enough; the rest then goes nowhere."""
    output, watch = sys.stdout.fileno(), select.poll()
    watch.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def lost_output() -> Iterator[tuple[str, str]]:
    """The standard streams that could not take all that was written, each with the reason."""
    for name in STREAMS:
        raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
        if isinstance(raw, _Dropping) and raw.lost is not None:
            yield name, raw.lost


class _Dropping(io.FileIO):
    """A descriptor whose writes never fail: what it does not take is dropped."""

    lost: str | None = None
    """Why the first such write failed."""

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        try:
            written = super().write(data)
            if written is None and self.lost is None:  # non-blocking, and full
                select.select([], [self.fileno()], [], DRAIN_S)
                written = super().write(data)
            if written is not None:
                return written
            reason = "it does not accept more"
        except OSError as error:
            reason = error.strerror or str(error)
        self.lost = self.lost or reason
        return len(data)


def _dropping(descriptor: int, stream: IO[str] | None) -> io.TextIOWrapper:
    raw = io.BufferedWriter(_Dropping(descriptor, "w", closefd=False))
    lines = stream is not None and (stream.isatty() or descriptor == 2)
    encoding = stream.encoding if stream is not None else "utf-8"
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=lines)


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
