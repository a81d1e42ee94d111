"""Training that begins before its data are whole: the preparation runs in a process beside it."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from myllm.config import DataConfig
from myllm.data.dataset import MANIFEST, PROGRESS, WORK, Dataset, find_dataset, find_dataset_folder
from myllm.data.sources.source import check_source
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.files import is_locked
from myllm.formatting import format_bytes

from .prepare import clear_work, disk_errors_for_users, is_complete, lock_path, preparation_lock, prepare, resolve
from .work_items import init_worker

LOOK_EVERY_S = 0.3
NICE = 10
"""How far the preparation stands back from training, on nice's scale of 0 to 19."""
STARTING = ".beside"
"""Names the lock of a preparation that training started, from its first moment on."""
PATIENCE_S = 60
"""How long nobody may be at work on a data set before that is taken for an end: a process needs a while to start."""


def check_data_names(config: DataConfig) -> None:
    """Refuse names of data that lead nowhere, at once: no text is read, no server asked, and torch not loaded.

    Raises:
        UserError: no such data set, source or vocabulary.
    """
    load_tokenizer(config.tokenizer)
    if config.dataset is not None:
        find_dataset_folder(config.dataset, (MANIFEST, PROGRESS))
    else:
        check_source(config.source)


@contextmanager
def prepare_in_background(
    config: DataConfig, starts: bool, progress: bool = True, enough: Callable[[Dataset], bool] = lambda _: True
) -> Iterator[Dataset]:
    """The data set that the config asks for, as soon as its validation and first training shards are there.

    Args:
        enough: whether what is there is enough to begin with; asked again as long as there is less than the whole.
        starts: begin the preparation, unless it is done. One process a machine does; where another is already at it,
            such as `myllm data prepare`, that one is waited for.

    Raises:
        UserError: as `prepare`.
    """
    if config.dataset is not None:
        yield _with_enough(find_dataset(config.dataset, unfinished=True), enough)
        return
    folder = resolve(config).folder
    if is_complete(folder):
        if starts and (folder / WORK).exists():  # a preparation was killed right after its last word
            with disk_errors_for_users(), preparation_lock(folder):
                clear_work(folder)
        yield Dataset.open(folder)
        return
    process: BaseProcess | None = None
    if starts:
        with disk_errors_for_users():  # before a process is started that would find the same
            folder.parent.mkdir(parents=True, exist_ok=True)
        process = get_context("spawn").Process(target=_prepare, args=(config, folder, progress), name="preparation")
        process.start()
    try:
        _wait_for_start(folder, process)
        yield _with_enough(Dataset.open(folder, unfinished=True), enough)
    finally:
        if process is not None:
            process.terminate()  # what it has finished is kept; the next start goes on from there
            process.join()


def _with_enough(dataset: Dataset, enough: Callable[[Dataset], bool]) -> Dataset:
    """
    Raises:
        UserError: the preparation ended early.
    """
    while not dataset.complete and not enough(dataset):
        raise_if_abandoned(dataset)
        time.sleep(LOOK_EVERY_S)
    return dataset


def _prepare(config: DataConfig, folder: Path, progress: bool) -> None:
    """What the process beside does. It ends with the one that started it."""
    os.nice(NICE)  # its workers too, one a core: training's processes are not to wait for them
    init_worker()
    try:
        # Before the data set's own lock come the source's digests, which take minutes where there is much text.
        with disk_errors_for_users(), preparation_lock(folder, STARTING):
            prepare(config, progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _wait_for_start(folder: Path, process: BaseProcess | None) -> None:
    """
    Raises:
        UserError: the preparation ended early.
    """
    idle_since = time.monotonic()
    while not is_complete(folder):
        # What an earlier preparation left is not enough: nobody may be going on with it yet.
        if (folder / PROGRESS).exists() and is_being_prepared(folder):
            dataset = Dataset.open(folder, unfinished=True)
            if dataset.val.tokens and dataset.train.tokens:
                return
        if process is not None and not process.is_alive():
            if is_complete(folder):
                return
            raise UserError(_ended(folder))
        if process is not None or is_being_prepared(folder):
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > PATIENCE_S:
            raise UserError(_ended(folder))
        time.sleep(LOOK_EVERY_S)


def is_being_prepared(folder: Path) -> bool:
    """Whether a process is preparing this data set: it holds a lock, which the system takes back when it ends."""
    return any(is_locked(lock_path(folder, what)) for what in ("", STARTING))


def raise_if_abandoned(dataset: Dataset) -> None:
    """
    Raises:
        UserError: the data set is not whole, and nobody is making the rest of it.
    """
    for _ in range(3):  # one process may be taking over from another
        dataset.refresh()
        if dataset.complete or is_being_prepared(dataset.folder):
            return
        time.sleep(1)
    raise UserError(_ended(dataset.folder))


def _ended(folder: Path) -> str:
    return (
        f"the preparation of {folder} ended before it was whole (its own message is above, or where it was started); "
        "start the same command again: what is finished is kept"
    )


def describe_progress(dataset: Dataset) -> str:
    """For people: how much of a growing data set is there."""
    progress = dataset.manifest.get("progress")
    there = f"{dataset.train.tokens:,} tokens to train on"
    if dataset.complete or not progress or not progress["source_bytes"]:
        return there
    share = progress["done_bytes"] / progress["source_bytes"]
    return f"{there} so far, from {share:.0%} of {format_bytes(progress['source_bytes'])}"
