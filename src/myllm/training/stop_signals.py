"""Asking a run to stop: by a signal, by a limit of time, or because its launcher is gone.

    SIGINT, SIGTERM    save, stop, exit with 128 + the signal's number; a second SIGINT leaves at once
    SIGHUP, SIGQUIT    likewise: the terminal is gone; Ctrl-\\. Under nohup, SIGHUP stays ignored
    SIGUSR1            save, stop, exit with 75, "not finished, start me again": Slurm's --signal=USR1@120
    SIGUSR2, SIGXCPU   as SIGUSR1: how other schedulers say that time is up
    train.max_wall_s   as SIGUSR1, early enough for the save

Under torchrun a run that was stopped exits with 0, since torchrun starts anything else again (--max-restarts);
`myllm.distributed.elastic` then ends with the code above, and `myllm status RUN` gives it too.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from myllm.distributed import launcher as ranks
from myllm.errors import EXIT_UNFINISHED, TIME_LIMIT, TIME_LIMIT_SIGNALS
from myllm.formatting import format_clock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, *TIME_LIMIT_SIGNALS)
FIRST_SAVE_S = 30.0
"""Kept free for a save while none has been measured; at most a tenth of the limit."""


@dataclass
class StopRequest:
    """Whether this rank has been asked to stop, and why. What all ranks do about it, they decide together."""

    signal: int | None = None
    """The first one's number, or TIME_LIMIT."""
    deadline: float | None = None
    """By the monotonic clock, which no change of the machine's time moves."""
    save_s: float = 0.0
    """The longest save so far, whole; until there was one, a guess."""
    step_s: float = 0.0
    """The longest time so far between two looks at this."""

    _looked: float | None = None

    def requested(self) -> bool:
        if self.signal is None and self.deadline is not None:
            now = time.monotonic()
            self.step_s, self._looked = max(self.step_s, now - (self._looked or now)), now
            if now + 1.5 * self.save_s + self.step_s >= self.deadline:
                self.signal = TIME_LIMIT
        return self.signal is not None

    def note_save_time(self, slowest_s: float | None) -> None:
        """How long the slowest save so far took, and so how much the time limit must leave for the last."""
        if slowest_s is not None:
            self.save_s = slowest_s


def describe_stop(stopped_by: int, max_wall_s: float | None) -> str:
    """For people."""
    if stopped_by == TIME_LIMIT:
        return f"the time limit, train.max_wall_s {format_clock(max_wall_s or 0)}"
    return signal.Signals(stopped_by).name


def exit_unfinished_on_time_signals() -> None:
    """While there is nothing to save yet, SIGUSR1 and its kin end the process with the code that asks for another
    start."""

    def leave(_: int, __: FrameType | None) -> None:
        ranks.exit_with(EXIT_UNFINISHED)

    for number in TIME_LIMIT_SIGNALS:
        signal.signal(number, leave)


@contextmanager
def handle_stop_signals(max_wall_s: float | None = None, started: float | None = None) -> Iterator[StopRequest]:
    """SIGNALS ask for a stop, and so does the time limit; a second SIGINT leaves at once.

    Args:
        max_wall_s: the limit, in seconds.
        started: by the monotonic clock, from when on that counts; None: from now on.
    """
    request = StopRequest()
    if max_wall_s is not None:
        request.deadline = (time.monotonic() if started is None else started) + max_wall_s
        request.save_s = min(FIRST_SAVE_S, max_wall_s / 10) / 1.5

    def ask(number: int, _: FrameType | None) -> None:
        if request.signal is None:
            request.signal = number

    # nohup has SIGHUP ignored: its user wants the run to outlive the terminal.
    heard = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    # A handler in Python waits until the main thread is back from whatever it does in C, a collective that hangs say.
    # What stands behind this descriptor is written by the system's own handler, and another thread reads it.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_leave_when_asked_twice, args=(ours,), name="signals", daemon=True)
    listener.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(descriptor)
        theirs.close()  # ends the thread
        listener.join()
        ours.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_when_asked_twice(numbers: socket.socket) -> None:
    interrupted = False
    while received := numbers.recv(64):
        for number in received:
            # torchrun makes SIGTERM of a second Ctrl-C.
            if interrupted and (number == signal.SIGINT or (number == signal.SIGTERM and ranks.is_launched())):
                with suppress(OSError):
                    os.write(2, b"\nleft at once, unsaved; the same command goes on from the newest checkpoint\n")
                os._exit(128 + signal.SIGINT)
            interrupted = interrupted or number == signal.SIGINT
