"""Processes of a preparation: workers that tokenize and write shards, and a few that download ahead of them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from myllm import paths
from myllm.data.sources.convert import converted_path, fetch_file
from myllm.data.sources.download import local_path
from myllm.data.sources.source import SourceFile
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError

from .spec import DatasetSpec

PATIENCE_S = 10
"""How long workers have to exit. A batch of documents takes milliseconds, a document of 64 MB seconds."""


class Downloads:
    """The files of a source on this disk: fetched a few ahead, deleted once their tokens are written."""

    AHEAD_FILES = 3
    """Files downloaded or under way at a time, if each file is many work items."""

    def __init__(self, spec: DatasetSpec, work: Path, pool: Executor | None) -> None:
        self._pool, self._keep, self._column = pool, spec.config.keep_downloads, spec.source.column
        self._kept_folder = paths.downloads_dir() / spec.source.name
        self._own_folder = work / "downloads"
        self._futures: dict[str, Future[Path]] = {}

    def start(self, file: SourceFile) -> Future[Path]:
        """The local path of a file, once it is there."""
        if file.name not in self._futures:
            if self._pool is not None and (file.remote or file.builder):
                folder = self._kept_folder if self._keep else self._own_folder
                future = self._pool.submit(fetch_file, file, self._column, self._own_folder, folder, self._kept_folder)
            else:
                future = Future()
                future.set_result(local_path(file, self._own_folder))
            self._futures[file.name] = future
        return self._futures[file.name]

    def delete(self, file: SourceFile) -> None:
        """Delete a file that was downloaded for this preparation only."""
        self._futures.pop(file.name, None)
        if file.builder:
            converted_path(file, self._own_folder).unlink(missing_ok=True)
        elif file.remote:
            local_path(file, self._own_folder).unlink(missing_ok=True)


@dataclass(frozen=True)
class Workers:
    """The running processes."""

    count: int
    pool: Executor
    downloads: Downloads


@contextmanager
def start_workers(spec: DatasetSpec, work: Path, count: int) -> Iterator[Workers]:
    """Run worker processes for the length of a `with` block.

    Raises:
        UserError: a worker was killed.
    """
    context = get_context("spawn")  # a forked child would inherit the locks of the parent's threads
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=init_worker)
    converts = any(file.builder for file in spec.source.files)
    needed = converts or any(file.remote for file in spec.source.files)
    # Conversions take a third of the time of tokenizing; downloads wait for servers.
    downloaders = min(8, 2 + count // (3 if converts else 8))
    download_pool = ProcessPoolExecutor(downloaders, mp_context=context, initializer=init_worker) if needed else None
    with pool:
        try:
            yield Workers(count, pool, Downloads(spec, work, download_pool))
        except BrokenProcessPool:
            raise UserError(
                "a worker process died: it ran out of memory (lower data.workers), or it was started by a script "
                "whose work is not under `if __name__ == '__main__':`"
            ) from None
        finally:
            _shut_down(pool, PATIENCE_S)
            if download_pool is not None:
                _shut_down(download_pool, 2 if converts else 0)  # `datasets` has locks to clean up


def _shut_down(pool: ProcessPoolExecutor, patience_s: float) -> None:
    """Shut a pool down in any state, and kill the processes that are still alive after `patience_s`.

    After a worker was killed, the pool's own shutdown can hang: on a process that has just started, or on one that
    waits for a lock of the dead one.
    """
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    deadline = time.monotonic() + patience_s
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.kill()


def init_worker() -> None:
    """Run first in a worker process: leave the terminal's signals to the parent, and exit when the parent exits.

    Each worker holds both ends of the queue it reads, so it would wait forever after the parent was killed.
    """
    protect_output(keep_going=True)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for worker processes"

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
