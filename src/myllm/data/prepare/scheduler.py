"""The order in which files are downloaded and units tokenised: a bounded number at once, results in order."""

import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from myllm import paths
from myllm.data.sources.download import download_file, local_path
from myllm.data.sources.hub_listing import UnreachableError, suggest_fallback
from myllm.data.sources.source import SourceFile

from .progress import Progress
from .spec import DatasetSpec
from .work_items import WorkItem, is_tokenized, tokenize_item, tokens_path


class Downloads:
    """The files of a source on this disk: fetched a few ahead, deleted once their tokens are safe."""

    AHEAD_FILES = 3
    """So many files are on the disk or on their way at a time where a file is many units."""

    def __init__(self, recipe: DatasetSpec, work: Path, pool: Executor | None) -> None:
        self._pool, self._keep = pool, recipe.config.keep_downloads
        self._kept_folder = paths.downloads_dir() / recipe.source.name
        self._own_folder = work / "downloads"
        self._futures: dict[str, Future[Path]] = {}

    def start(self, file: SourceFile) -> Future[Path]:
        """The file's place, once it is there."""
        if file.name not in self._futures:
            if file.remote and self._pool is not None:
                folder = self._kept_folder if self._keep else self._own_folder
                self._futures[file.name] = self._pool.submit(download_file, file, folder, self._kept_folder)
            else:
                here: Future[Path] = Future()
                here.set_result(local_path(file, self._own_folder))
                self._futures[file.name] = here
        return self._futures[file.name]

    def forget(self, file: SourceFile) -> None:
        """Its tokens are safe: delete what was downloaded for this preparation alone."""
        self._futures.pop(file.name, None)
        if file.remote:
            local_path(file, self._own_folder).unlink(missing_ok=True)


@dataclass
class WorkScheduler:
    """Units to tokenise, and with what."""

    recipe: DatasetSpec
    units: list[WorkItem]
    numbers: Sequence[int]
    """Which of the units, in order."""
    work: Path
    pool: Executor
    downloads: Downloads
    in_flight: int
    """Units under way or waiting for an earlier one, at most: what bounds memory and disk."""
    meanwhile: Callable[[], object] = lambda: None
    """Called every second or so while the next unit is not finished."""

    @contextmanager
    def finished(self, bar: Progress) -> Iterator[Iterator[int]]:
        """The numbers of finished units, in order. Leaving the block stops what is still under way."""
        stop = self.work / f".stop-{secrets.token_hex(4)}"
        waiting: deque[tuple[int, Future[None] | None]] = deque()
        try:
            yield self._finished(bar, waiting, stop)
        finally:  # where the caller wants no more, or something failed, the rest stops instead of running on
            stop.touch()
            for _, future in waiting:
                if future is not None:
                    future.cancel()

    def _finished(self, bar: Progress, waiting: deque[tuple[int, Future[None] | None]], stop: Path) -> Iterator[int]:
        left = deque(self.numbers)
        uses = Counter(piece.file.name for number in left for piece in self.units[number])
        while left or waiting:
            blocking: list[Future] = []
            if left and len(waiting) < self.in_flight:
                blocking = self._submit(left, waiting, stop)
                if not blocking:
                    continue
            if waiting:
                number, job = waiting[0]
                if job is None or job.done():
                    waiting.popleft()
                    if job is not None:
                        job.result()
                    self._forget(number, uses)
                    yield number
                    continue
                blocking.append(job)
            wait(blocking, timeout=1, return_when=FIRST_COMPLETED)
            self.meanwhile()
            bar.refresh()

    def _submit(
        self, left: deque[int], waiting: deque[tuple[int, Future[None] | None]], stop: Path
    ) -> list[Future[Path]]:
        """Hand the next unit to a worker; or the downloads that have to come first."""
        number = left[0]
        job = None
        if not is_tokenized(self.work, number):
            files = self._start_downloads(left, len(waiting))
            if not all(future.done() for future in files.values()):
                return [future for future in files.values() if not future.done()]
            try:
                places = {name: future.result() for name, future in files.items()}
            except UnreachableError as error:
                raise suggest_fallback(error, self.recipe.source.name) from None
            source, config, out = self.recipe.source, self.recipe.config, tokens_path(self.work, number)
            job = self.pool.submit(tokenize_item, self.units[number], places, source, config, out, stop)
        waiting.append((left.popleft(), job))
        return []

    def _start_downloads(self, left: deque[int], waiting: int) -> dict[str, Future[Path]]:
        """Have the files of the next units fetched; those of the first one, by name."""
        # For the units that may start now, a few more so that no worker waits for its file, and no further: a large
        # file is many units, and the whole source would be on the disk at once.
        enough, names = self.in_flight - waiting + self.in_flight // 4, set()
        for number in islice(left, 1_000):
            if enough <= 0 and len(names) >= Downloads.AHEAD_FILES:
                break
            if not is_tokenized(self.work, number):
                enough -= 1
                names |= {piece.file.name for piece in self.units[number]}
                for piece in self.units[number]:
                    self.downloads.start(piece.file)
        return {piece.file.name: self.downloads.start(piece.file) for piece in self.units[left[0]]}

    def _forget(self, number: int, uses: Counter[str]) -> None:
        for piece in self.units[number]:
            uses[piece.file.name] -= 1
            if not uses[piece.file.name]:
                self.downloads.forget(piece.file)
