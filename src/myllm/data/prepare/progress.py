"""Progress of a preparation: a bar in a terminal, lines in a log."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Union

from tqdm import tqdm

from myllm.distributed import terminal

LOG_EVERY_S = 30.0


class ProgressLines:
    """The part of tqdm's interface that preparations use, for logs: whole lines, and few."""

    def __init__(self, total: int, description: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._description, self._clock = total, description, clock
        self._done, self._postfix = 0, ""
        self._started = self._logged = clock()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n_bytes: int) -> None:
        self._done += n_bytes
        self.refresh()

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        self._postfix = text

    def refresh(self) -> None:
        """Print a line if the last one is old enough."""
        now = self._clock()
        if now - self._logged < LOG_EVERY_S:
            return
        self._logged = now
        # Before the first file or part is finished, nobody knows the speed.
        speed = "{rate_fmt}, {remaining} left" if self._done else "{elapsed} so far"
        line = tqdm.format_meter(
            self._done, max(self._total, self._done), now - self._started, prefix=self._description, unit="B",
            unit_scale=True, postfix=self._postfix,
            bar_format="{desc}: {percentage:.0f}% of {total_fmt}B, " + speed + "{postfix}",
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)


ProgressBar = Union["tqdm[Any]", ProgressLines]


def progress_bar(
    size_bytes: int, progress: bool, description: str = "tokenizing", taken_over: Connection | None = None
) -> ProgressBar:
    """For `size_bytes` of a source.

    Args:
        taken_over: to another process, which says when it is about to draw in the same terminal and waits until this
            bar is gone.
    """
    if progress and not terminal.shows_bars():
        return ProgressLines(size_bytes, description)
    bar = terminal.progress_bar(size_bytes, desc=description, unit="B", unit_scale=True, disable=not progress)
    if progress and taken_over is not None:

        def close() -> None:
            with suppress(OSError, EOFError):
                taken_over.recv()
            bar.close()
            with suppress(OSError):
                taken_over.send(None)

        threading.Thread(target=close, daemon=True).start()
    return bar
