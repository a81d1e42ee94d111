"""Whether a data set is being prepared, and how far the preparation is: locks that end with their process, and bars."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

from tqdm import tqdm

from myllm.data.dataset import Dataset
from myllm.errors import MachineError
from myllm.files import file_lock, is_locked
from myllm.formatting import format_bytes

LOG_EVERY_S = 30.0
BACKGROUND = ".background"
"""Suffix of a second lock: a preparation started by training holds it from its first moment. The data set's own lock is
taken only after the source's files are hashed, which takes minutes for a large source."""


class PreparationEnded(MachineError):
    """A data set is incomplete, and nobody is preparing the rest of it."""


@contextmanager
def preparation_lock(folder: Path, suffix: str = "") -> Iterator[None]:
    """Hold the preparation of a data set, or of a part of it, for this process; other processes wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(lock_path(folder, suffix)):
        yield


def lock_path(folder: Path, suffix: str = "") -> Path:
    return folder.parent / f".{folder.name}{suffix}.lock"


def is_being_prepared(folder: Path) -> bool:
    return any(is_locked(lock_path(folder, suffix)) for suffix in ("", BACKGROUND))


def raise_if_abandoned(dataset: Dataset) -> None:
    """Refresh a data set that is not complete yet.

    Raises:
        PreparationEnded: no process is preparing the rest of it.
    """
    for _ in range(3):  # one process may be taking over from another
        dataset.refresh()
        if dataset.complete or is_being_prepared(dataset.folder):
            return
        time.sleep(1)
    raise preparation_ended(dataset.folder)


def preparation_ended(folder: Path) -> PreparationEnded:
    return PreparationEnded(
        f"the preparation of {folder} ended before the data set was complete (its own message is above, or where it "
        "was started); run the same command again: finished work is kept"
    )


def describe_progress(dataset: Dataset) -> str:
    """Such as "1,000,000 training tokens so far, from 12% of 3.4 GB"."""
    tokens = f"{dataset.train.tokens:,} training tokens"
    progress = dataset.manifest.get("progress")
    if dataset.complete or not progress or not progress["source_bytes"]:
        return tokens
    fraction = progress["done_bytes"] / progress["source_bytes"]
    return f"{tokens} so far, from {fraction:.0%} of {format_bytes(progress['source_bytes'])}"


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

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self._postfix = text
        if refresh:
            self.refresh()

    def refresh(self) -> None:
        """Print a line if the last one is old enough."""
        now = self._clock()
        if now - self._logged < LOG_EVERY_S:
            return
        self._logged = now
        line = tqdm.format_meter(
            self._done, max(self._total, self._done), now - self._started, prefix=self._description, unit="B",
            unit_scale=True, postfix=self._postfix,
            bar_format="{desc}: {percentage:.0f}% of {total_fmt}B, {rate_fmt}, {remaining} left{postfix}",
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)


ProgressBar = Union["tqdm[Any]", ProgressLines]


def progress_bar(size_bytes: int, progress: bool, description: str = "tokenizing") -> ProgressBar:
    """For `size_bytes` of a source."""
    if progress and not sys.stderr.isatty():
        return ProgressLines(size_bytes, description)
    return tqdm(total=size_bytes, desc=description, unit="B", unit_scale=True, disable=not progress, leave=False)
