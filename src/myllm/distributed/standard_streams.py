"""What a program says to people, and that it never ends a run.

A terminal goes away, the reader of a pipe leaves, the disk behind a log is full, or there is no output at all (`>&-`):
training goes on, and says once, where it still can, what was lost. Letters that a terminal cannot show are escaped.
"""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

STREAMS = ("stdout", "stderr")
DRAIN_S = 1.0
"""How long a terminal that another program has made non-blocking may take to accept a line."""


def protect_output(keep_going: bool = False) -> None:
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


def flush_output() -> str | None:
    """Write what stdout still holds. Returns why that cannot be; what is left then goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


def stdout_closed() -> bool:
    """Whether what reads this program's output, such as `head`, has had enough; the rest then goes nowhere."""
    output, watch = sys.stdout.fileno(), select.poll()
    watch.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def output_failures() -> Iterator[tuple[str, str]]:
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
