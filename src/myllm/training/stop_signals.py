"""Graceful shutdown: on signals, at the wall-clock limit, or when the launcher dies.

    SIGINT, SIGTERM    save, stop, exit with 128 + the signal's number; a second SIGINT exits at once
    SIGHUP, SIGQUIT    the same: the terminal closed; Ctrl-\\. Under nohup, SIGHUP stays ignored
    SIGUSR1            save, stop, exit with 75, "not finished, start me again": Slurm's --signal=USR1@120
    SIGUSR2, SIGXCPU   the same as SIGUSR1: other schedulers use these when time is up
    train.max_wall_s   the same as SIGUSR1, early enough for the save

Under torchrun a stopped run exits with 0, because torchrun restarts anything else (--max-restarts);
`myllm.distributed.elastic` then exits with the code above, and `myllm status RUN` returns it too.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from myllm.distributed import launcher as ranks
from myllm.errors import EXIT_UNFINISHED, TIME_LIMIT, TIME_LIMIT_SIGNALS
from myllm.formatting import format_clock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, *TIME_LIMIT_SIGNALS)
FIRST_SAVE_S = 30.0
"""Reserved for a save before one has been measured; at most a tenth of the limit."""


@dataclass
class StopRequest:
    """Whether and why this rank was asked to stop. What follows from it is decided by all ranks together."""

    signal: int | None = None
    """The first signal's number, or TIME_LIMIT."""
    deadline: float | None = None
    """By the monotonic clock, which does not follow changes of the machine's time."""
    save_s: float = 0.0
    """The slowest save so far; a guess before the first one."""
    step_s: float = 0.0
    """The longest time so far between two calls of `requested`."""

    _last_call: float | None = None

    def requested(self) -> bool:
        if self.signal is None and self.deadline is not None:
            now = time.monotonic()
            self.step_s, self._last_call = max(self.step_s, now - (self._last_call or now)), now
            if now + 1.5 * self.save_s + self.step_s >= self.deadline:
                self.signal = TIME_LIMIT
        return self.signal is not None


def describe_stop(signal_number: int, max_wall_s: float | None) -> str:
    if signal_number == TIME_LIMIT:
        return f"the time limit, train.max_wall_s {format_clock(max_wall_s or 0)}"
    return signal.Signals(signal_number).name


def exit_unfinished_on_time_signals() -> None:
    """Before there is anything to save, SIGUSR1 and its like exit with the code that asks for another start."""

    def leave(_: int, __: FrameType | None) -> None:
        ranks.exit_with(EXIT_UNFINISHED)

    for number in TIME_LIMIT_SIGNALS:
        signal.signal(number, leave)


@contextmanager
def handle_stop_signals(max_wall_s: float | None = None, started: float | None = None) -> Iterator[StopRequest]:
    """Turn SIGNALS and the time limit into a stop request. A second SIGINT exits at once.

    Args:
        max_wall_s: the limit, in seconds.
        started: when it began to count, by the monotonic clock; None: now.
    """
    request = StopRequest()
    if max_wall_s is not None:
        request.deadline = (time.monotonic() if started is None else started) + max_wall_s
        request.save_s = min(FIRST_SAVE_S, max_wall_s / 10) / 1.5

    def on_signal(number: int, _: FrameType | None) -> None:
        if request.signal is None:
            request.signal = number

    # A Python handler waits until the main thread returns from C code, for example from a collective that hangs. The
    # operating system's own handler writes to this descriptor at once, and another thread reads it.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_exit_on_second_interrupt, args=(reader,), name="signals", daemon=True)
    thread.start()
    try:
        with signal_handler(SIGNALS, on_signal):
            yield request
    finally:
        signal.set_wakeup_fd(previous_fd)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


@contextmanager
def signal_handler(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals until the block ends. Under nohup, SIGHUP stays ignored: the run is to survive the terminal."""
    handled = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def raise_exit(number: int, _: FrameType | None) -> None:
    """A handler that raises, as Ctrl-C does, so that `finally` blocks run. Exits with 128 + the signal's number."""
    raise SystemExit(128 + number)


def _exit_on_second_interrupt(reader: socket.socket) -> None:
    interrupted = False
    while received := reader.recv(64):
        for number in received:
            # torchrun turns a second Ctrl-C into SIGTERM.
            if interrupted and (number == signal.SIGINT or (number == signal.SIGTERM and ranks.is_launched())):
                message = b"\nExiting without saving. Run the same command to resume from the latest checkpoint.\n"
                with suppress(OSError):
                    os.write(2, message)
                os._exit(128 + signal.SIGINT)
            interrupted = interrupted or number == signal.SIGINT
