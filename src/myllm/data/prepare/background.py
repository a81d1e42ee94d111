"""Training that begins before its data set is complete: a process in the background prepares the rest."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from myllm.config import DataConfig
from myllm.data.dataset import MANIFEST, PROGRESS, WORK, Dataset
from myllm.data.find import find_dataset, find_dataset_folder
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.mixture.spec import component_configs, find_mixture
from myllm.data.preparation_lock import (
    BACKGROUND,
    PreparationEnded,
    is_being_prepared,
    preparation_ended,
    preparation_lock,
)
from myllm.data.sources.source import check_source
from myllm.data.sources.text_column import parse_text_column
from myllm.data.tokenizer.load import load_tokenizer, trained_vocab_size
from myllm.distributed.terminal import shows_bars
from myllm.errors import PrintedError, UserError

from .prepare import disk_errors_for_users, prepare, resolve
from .work_dir import is_complete, remove_work_dir
from .workers import init_worker

POLL_S = 0.3
NICE = 10
"""Priority of the preparation below training's, on nice's scale of 0 to 19."""
HIDE_S = 1.0
"""How long training waits for the preparation's bar to disappear."""
PATIENCE_S = 60
"""How long no process may hold the data set's lock before the preparation counts as ended: a process needs time to
start."""


def check_data_names(config: DataConfig) -> None:
    """Check the names of data set, source and vocabulary without reading text, asking a server or loading torch.

    Raises:
        UserError: no such data set, source or vocabulary.
    """
    if mixture := find_mixture(config):
        if config.dataset is None and trained_vocab_size(config.tokenizer):
            raise UserError(
                f"the components of a mixture need one vocabulary, and {config.tokenizer} would learn one for each; "
                "train it first (`myllm tokenizer train`) and give its tokenizer.json"
            )
        for part in component_configs(config, mixture):
            check_data_names(part)
        return
    if trained_vocab_size(config.tokenizer) is None:
        load_tokenizer(config.tokenizer)
    if config.dataset is not None:
        find_dataset_folder(config.dataset, (MANIFEST, PROGRESS))
    else:
        check_source(config.source, config.suffixes)
        parse_text_column(config.text_column or "text")


@contextmanager
def prepare_in_background(
    config: DataConfig, starts: bool, progress: bool = True, min_train_tokens: float = 0
) -> Iterator[Dataset]:
    """The config's data set, as soon as its validation shards and the first training shards exist.

    The preparation ends with the `with` block. Finished work is kept, and the next start continues from it.

    Args:
        starts: start the preparation if the data set is not complete: one process on each machine does. Others wait
            for that process, or for a `myllm data prepare` that is already running.
        min_train_tokens: wait for this many training tokens, or for the complete data set; math.inf: for that.

    Raises:
        UserError: as `prepare`. A PrintedError if it ended the preparation's process, which has printed it.
        PreparationEnded: that process crashed or was killed.
    """
    if config.dataset is not None:
        yield _wait_for_tokens(find_dataset(config.dataset, allow_incomplete=True), min_train_tokens)
        return
    if mixture := find_mixture(config):  # one after the other: a mixture needs all of them complete
        with ExitStack() as stack:
            parts = component_configs(config, mixture)
            waiting = (prepare_in_background(part, starts, progress, math.inf) for part in parts)
            yield MixedDataset.of(mixture, [stack.enter_context(part) for part in waiting])
        return
    folder = resolve(config).folder
    if is_complete(folder):
        if starts and (folder / WORK).exists():  # a preparation was killed right after it wrote the manifest
            with disk_errors_for_users(), preparation_lock(folder):
                remove_work_dir(folder)
        yield Dataset.open(folder)
        return
    process: BaseProcess | None = None
    if starts:
        with disk_errors_for_users():  # here, before a process starts that would meet the same error
            folder.parent.mkdir(parents=True, exist_ok=True)
        context = get_context("spawn")
        terminal, other_end = context.Pipe()
        process = context.Process(target=_prepare, args=(config, folder, progress, other_end), name="preparation")
        process.start()
        other_end.close()  # so that `terminal` sees the end of the process
    try:
        try:
            _wait_for_first_shards(folder, process)
            dataset = _wait_for_tokens(Dataset.open(folder, allow_incomplete=True), min_train_tokens)
        except PreparationEnded:
            if process is not None:
                _raise_printed_error(terminal)
            raise
        if process is not None and progress and shows_bars():
            _take_terminal(terminal)
        yield dataset
    finally:
        if process is not None:
            process.terminate()
            process.join()


def _take_terminal(preparation: Connection) -> None:
    """From here on the terminal belongs to this process: the bar of the preparation is closed, or its process ended.

    A pipe, because multiprocessing.Event waits forever for a process that ended while it waited.
    """
    with suppress(OSError):
        preparation.send(None)
        preparation.poll(HIDE_S)


def _raise_printed_error(preparation: Connection) -> None:
    """Raise the UserError that ended the preparation. Does nothing if it crashed or was killed.

    The preparation prints the error, sends it and ends after it has released its locks: a moment later, or on a busy
    machine seconds.
    """
    with suppress(OSError, EOFError):
        if preparation.poll(PATIENCE_S) and (message := preparation.recv()):
            raise PrintedError(message) from None


def _prepare(config: DataConfig, folder: Path, progress: bool, terminal: Connection) -> None:
    """What the background process does. It ends with the process that started it."""
    # Its workers inherit this: there is one on each core, and training's processes must not wait for them.
    os.nice(NICE)
    init_worker()
    try:
        with disk_errors_for_users(), preparation_lock(folder, BACKGROUND):
            prepare(config, progress, terminal)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        with suppress(OSError):
            terminal.send(str(error))
        sys.exit(2)


def _wait_for_first_shards(folder: Path, process: BaseProcess | None) -> None:
    """Raises PreparationEnded if the preparation ended before there were any."""
    idle_since = time.monotonic()
    while not is_complete(folder):
        # Shards of an earlier, interrupted preparation do not count until a process continues it.
        if (folder / PROGRESS).exists() and is_being_prepared(folder):
            dataset = Dataset.open(folder, allow_incomplete=True)
            if dataset.val.tokens and dataset.train.tokens:
                return
        if process is not None and not process.is_alive():
            if is_complete(folder):
                return
            raise preparation_ended(folder)
        if process is not None or is_being_prepared(folder):
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > PATIENCE_S:
            raise preparation_ended(folder)
        time.sleep(POLL_S)


def _wait_for_tokens(dataset: Dataset, min_train_tokens: float) -> Dataset:
    """Raises PreparationEnded if the preparation ended before there were that many."""
    while not dataset.complete and dataset.train.tokens < min_train_tokens:
        dataset.raise_if_abandoned()
        time.sleep(POLL_S)
    return dataset
