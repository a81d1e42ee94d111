"""When files are downloaded and work items tokenized: a bounded number at a time, results in order."""

import secrets
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path

from myllm.data.sources.hub_listing import UnreachableError, suggest_fallback

from .progress import ProgressBar
from .spec import DatasetSpec
from .work_items import is_tokenized, tokenize_item, tokens_path
from .workers import Downloads, Workers


class WorkScheduler:
    """Tokenizes some work items of a data set into a folder."""

    def __init__(
        self,
        spec: DatasetSpec,
        work: Path,
        workers: Workers,
        numbers: Sequence[int] | None = None,
        while_waiting: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            numbers: of the work items, in order. None: all.
            while_waiting: called about once a second while the next item is not finished.
        """
        self._spec, self._work, self._workers, self._while_waiting = spec, work, workers, while_waiting
        self._items = spec.work_items
        self._config = replace(spec.config, tokenizer=str(spec.tokenizer.file))
        self.numbers = range(len(self._items)) if numbers is None else numbers
        self._queued = deque(self.numbers)
        self._running: deque[tuple[int, Future[None] | None]] = deque()
        """In order, with None for an item that an earlier call finished."""
        self._max_running = 2 * workers.count
        """Including those that wait for an earlier one: this bounds memory and disk."""
        self._uses = Counter(part.file.name for number in self.numbers for part in self._items[number])
        self._stop = work / f".stop-{secrets.token_hex(4)}"
        """Once this file exists, the items that are still running are abandoned."""

    def run(self, bar: ProgressBar) -> Generator[int]:
        """The numbers of finished items, in order. Closing the iterator stops the items that are still running."""
        try:
            while self._queued or self._running:
                blocking: list[Future] = []
                if self._queued and len(self._running) < self._max_running:
                    blocking += self._start_next()
                    if not blocking:
                        continue
                if self._running:
                    number, job = self._running[0]
                    if job is None or job.done():
                        self._running.popleft()
                        if job is not None:
                            job.result()
                        self._delete_downloads(number)
                        bar.update(item_bytes(self._spec, [number]))
                        yield number
                        continue
                    blocking.append(job)
                wait(blocking, timeout=1, return_when=FIRST_COMPLETED)
                self._while_waiting()
                bar.refresh()
        finally:
            self._stop.touch()
            for _, job in self._running:
                if job is not None:
                    job.cancel()

    def _start_next(self) -> list[Future[Path]]:
        """Hand the next item to a worker. Returns the downloads it still needs, in which case it is not handed over."""
        number, job = self._queued[0], None
        if not is_tokenized(self._work, number):
            downloads = self._start_downloads()
            if pending := [future for future in downloads.values() if not future.done()]:
                return pending
            try:
                file_paths = {name: future.result() for name, future in downloads.items()}
            except UnreachableError as error:
                raise suggest_fallback(error, self._spec.source.name) from None
            job = self._workers.pool.submit(
                tokenize_item, self._items[number], file_paths, self._spec.source, self._config,
                tokens_path(self._work, number), self._stop,
            )  # fmt: skip
        self._running.append((self._queued.popleft(), job))
        return []

    def _start_downloads(self) -> dict[str, Future[Path]]:
        """Start the downloads of the next items. Returns those of the first one, by name."""
        # For the items that may start now and a few more, so that no worker waits for its file. No further: a large
        # file is many items, and the whole source would be on the disk at once.
        items = self._max_running - len(self._running) + self._max_running // 4
        names: set[str] = set()
        for number in islice(self._queued, 1_000):
            if items <= 0 and len(names) >= Downloads.AHEAD_FILES:
                break
            if not is_tokenized(self._work, number):
                items -= 1
                names |= {part.file.name for part in self._items[number]}
                for part in self._items[number]:
                    self._workers.downloads.start(part.file)
        first = self._items[self._queued[0]]
        return {part.file.name: self._workers.downloads.start(part.file) for part in first}

    def _delete_downloads(self, number: int) -> None:
        for part in self._items[number]:
            self._uses[part.file.name] -= 1
            if not self._uses[part.file.name]:
                self._workers.downloads.delete(part.file)


def item_bytes(spec: DatasetSpec, numbers: Sequence[int]) -> int:
    """Bytes of the source in some work items."""
    return sum(part.size_bytes for number in numbers for part in spec.work_items[number])
