"""A program in a terminal of a given width, and what the terminal shows."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyte

ROWS = 200
"""So many that nothing scrolls away."""


@dataclass
class Session:
    """What a program wrote: the states of the screen after each line and return of the carriage, and the bytes."""

    screens: list[list[str]]
    written: bytes
    exit_code: int

    @property
    def final(self) -> list[str]:
        return self.screens[-1]

    def seen(self, text: str) -> bool:
        return any(text in line for screen in self.screens for line in screen)


def run_in_terminal(
    words: list[str], columns: int, stop_at: str | None = None, timeout_s: float = 240, **environment: str
) -> Session:
    """Run a program to its end.

    Args:
        stop_at: press Ctrl-C as soon as the screen shows this.
    """
    screen = pyte.Screen(columns, ROWS)
    stream, screens, written = pyte.ByteStream(screen), [], b""
    lines: dict[int, str] = {}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    values = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    values |= {"TERM": "xterm", **environment}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=values, preexec_fn=_controlling_terminal(theirs)
    )
    os.close(theirs)
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            readable, _, _ = select.select([ours], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"no end after {timeout_s} s:\n" + "\n".join(screens[-1] if screens else [])
            try:
                data = os.read(ours, 65_536)
            except OSError:  # the last process has closed the terminal
                break
            written += data
            # However much has come since the last time: a bar that was there for a moment is in one of the states.
            for part in re.split(rb"(?<=[\r\n])", data):
                stream.feed(part)
                screens.append(shown(screen, lines))
            if stop_at is not None and any(stop_at in line for line in screens[-1]):
                os.write(ours, b"\x03")
                stop_at = None
        return Session(screens, written, process.wait(timeout_s))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        os.close(ours)


def shown(screen: pyte.Screen, lines: dict[int, str]) -> list[str]:
    """The lines of a screen that are not empty. `lines` keeps those that stay as they were."""
    for row in screen.dirty:
        lines[row] = "".join(screen.buffer[row][column].data for column in range(screen.columns)).rstrip()
    screen.dirty.clear()
    return [lines[row] for row in sorted(lines) if lines[row]]


def _controlling_terminal(descriptor: int) -> Callable[[], None]:
    def take() -> None:
        os.setsid()
        fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)

    return take
