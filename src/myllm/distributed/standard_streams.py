"""Keep a closed terminal, pipe or output file from ending a run.

If the terminal is closed, the reader of a pipe exits, the disk of a log is full, or there is no output at all (`>&-`),
training continues and reports once, where it still can, what was lost. Characters that a terminal cannot show are
escaped.
"""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any, cast

STREAMS = ("stdout", "stderr")
DRAIN_S = 1.0
"""How long a non-blocking terminal may take to accept a line."""


def protect_output(keep_going: bool = False) -> None:
    """Make the standard streams safe to write to. Programs call this first.

    Args:
        keep_going: drop output that stdout does not accept, instead of raising OSError. stderr always drops it.
    """
    # The next file that is opened would get the number of a closed descriptor, and then messages.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # already in use by other code
            sys.stdin.reconfigure(errors="surrogateescape")  # as for file names: invalid UTF-8 is not an error
    for number, name in enumerate(STREAMS, start=1):
        stream = getattr(sys, name)
        ours = stream is getattr(sys, f"__{name}__")  # not replaced by a notebook or a test
        if stream is None or (ours and (keep_going or name == "stderr")):
            setattr(sys, name, _dropping(number, stream))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> str | None:
    """Flush stdout. If that fails, discard the rest and return the reason."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


def stdout_closed() -> bool:
    """True if the reader of stdout (for example `head`) has exited. Further output is then discarded."""
    output, watch = sys.stdout.fileno(), select.poll()
    watch.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def output_failures() -> Iterator[tuple[str, str]]:
    """The standard streams that did not accept all output, each with the reason."""
    for name in STREAMS:
        raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
        if isinstance(raw, _Dropping) and raw.lost is not None:
            yield name, raw.lost


class _Dropping(io.FileIO):
    """A descriptor whose writes never fail: output that it does not accept is dropped."""

    lost: str | None = None
    """The reason of the first failed write."""

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override] # any buffer in typeshed
        try:
            n_written = super().write(data)
            if n_written is None and self.lost is None:  # non-blocking and full
                select.select([], [self.fileno()], [], DRAIN_S)
                n_written = super().write(data)
            if n_written is not None:
                return n_written
            reason = "it does not accept more"
        except OSError as error:
            reason = error.strerror or str(error)
        self.lost = self.lost or reason
        return len(data)


def _dropping(descriptor: int, stream: IO[str] | None) -> io.TextIOWrapper:
    raw: Any = io.BufferedWriter(cast(Any, _Dropping(descriptor, "w", closefd=False)))
    lines = stream is not None and (stream.isatty() or descriptor == 2)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=lines)
