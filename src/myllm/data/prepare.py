"""Text to shards: tokenise in parallel processes, hold out validation, write, hash, rename.

    source files ─▶ seeded order ─▶ units ─▶ [worker: read, tokenise] ─▶ unit files ─┐
                                                                                     ▼
                       shards ◀─ [worker: copy, hash] ◀─ cut list ◀─ documents in order: val first, then train

Work is cut into units by the order of the source's files alone, and the cut list is made in that order, so the bytes do
not depend on the number of workers. Everything happens in a temporary folder that gets its name when it is whole.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import paths
from ..config import DataConfig
from ..errors import UserError
from ..files import fsync_folder, locked, out_of_space, write_json
from . import sources
from .cuts import CutList, cut_spans
from .shards import FORMAT, MANIFEST, Dataset, Shard, find_dataset
from .sources import Source, SourceFile
from .tokenize_unit import STOP, UnitTokens, start_worker, tokenize_unit, write_shard
from .tokenizer import Tokenizer

UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG
)  # fmt: skip
UNIT_BYTES = 2_000_000
"""Small files are handed to a worker together, up to about this much text."""
BYTES_PER_TOKEN = 4
"""Rough, for English and code; only for estimates made before anything is read."""


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a data set, and so its name."""

    source: Source
    tokenizer_sha256: str
    val_tokens: int
    target_tokens: int | None
    shard_tokens: int
    shuffle_seed: int

    @property
    def folder(self) -> Path:
        return paths.datasets() / f"{self.source.name}-{self.fingerprint[:12]}"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        content = hashlib.sha256()
        for file in sorted(self.source.files, key=lambda file: file.name):
            content.update(f"{file.name}\0{file.digest}\n".encode(errors="surrogateescape"))
        return {
            "format": FORMAT,
            "source": self.source.name,
            "source_sha256": content.hexdigest(),
            "tokenizer_sha256": self.tokenizer_sha256,
            "val_tokens": self.val_tokens,
            "target_tokens": self.target_tokens,
            "shard_tokens": self.shard_tokens,
            "shuffle_seed": self.shuffle_seed,
        }


def recipe_of(config: DataConfig) -> Recipe:
    source = sources.find_source(config.source)
    # At most about a tenth of the source: a small corpus keeps something to train on.
    most = max(source.size_bytes // (10 * BYTES_PER_TOKEN), 1)
    return Recipe(
        source=source,
        tokenizer_sha256=Tokenizer().sha256,
        val_tokens=min(config.val_tokens, most),
        target_tokens=config.target_tokens,
        shard_tokens=config.shard_tokens,
        shuffle_seed=config.shuffle_seed,
    )


def prepare(config: DataConfig, progress: bool = True) -> Dataset:
    """The data set that the config asks for, made if it is not there yet.

    A second process that asks for the same one waits for the first. What an interrupted preparation left is removed.

    Raises:
        UserError: bad source, too little text, no room on the disk. Nothing half-made is left.
    """
    if config.dataset is not None:
        return find_dataset(config.dataset)
    recipe = recipe_of(config)
    if not _made(recipe):
        with _clear_disk_errors():
            paths.datasets().mkdir(parents=True, exist_ok=True)
            with locked(paths.datasets() / f".{recipe.folder.name}.lock"):
                if not _made(recipe):  # another process may have made it meanwhile
                    _check_disk(recipe)
                    with _whole_or_nothing(recipe.folder) as work:
                        _build(recipe, work, config.workers or available_cores(), progress)
    return Dataset.open(recipe.folder)


def _made(recipe: Recipe) -> bool:
    return (recipe.folder / MANIFEST).is_file()


def available_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A work folder that becomes `folder` if the body succeeds, and vanishes if it does not. The lock must be held."""
    prefix = f".partial-{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):  # by a killed preparation
        shutil.rmtree(left, ignore_errors=True)
    # Named anew each time: a worker that outlives a killed parent by a moment writes to no folder of ours.
    work = folder.with_name(prefix + secrets.token_hex(4))
    try:
        work.mkdir()
        yield work
        fsync_folder(work)
        shutil.rmtree(folder, ignore_errors=True)  # without a manifest: what someone's `rm -r` did not get to
        work.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _clear_disk_errors() -> Iterator[None]:
    """A full disk or a folder that cannot be written is the user's to mend; any other fault keeps its traceback."""
    try:
        yield
    except OSError as error:
        if out_of_space(error):
            raise UserError(
                f"no room to write the data set under {paths.datasets()}: {error.strerror}; nothing was kept. "
                "Free some space, or set MYLLM_DATA to a folder on a larger disk"
            ) from None
        if error.errno in UNWRITABLE:
            raise UserError(
                f"cannot write {error.filename or paths.datasets()}: {error.strerror}; "
                "make it a folder that can be written, or set MYLLM_DATA to one"
            ) from None
        raise


def _check_disk(recipe: Recipe) -> None:
    tokens = recipe.source.size_bytes / BYTES_PER_TOKEN
    if recipe.target_tokens:
        tokens = min(tokens, recipe.target_tokens + recipe.val_tokens)
    need = int(4 * tokens)  # two bytes a token, once as unit files and once as shards
    free = shutil.disk_usage(paths.datasets()).free
    if need > free:
        raise UserError(
            f"the data set needs about {need / 1e6:,.0f} MB under {paths.datasets()}, which has {free / 1e6:,.0f} MB "
            "free; free some space, set MYLLM_DATA to a folder on a larger disk, or lower data.target_tokens"
        )


def _build(recipe: Recipe, work: Path, workers: int, progress: bool) -> None:
    units = list(make_units(recipe.source.files, recipe.shuffle_seed))
    (work / "units").mkdir()
    bar = tqdm(
        total=recipe.source.size_bytes, desc="tokenising", unit="B", unit_scale=True, disable=not progress, leave=False
    )
    # spawn: a forked child would inherit the parent's threads' locks.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    with bar, pool:
        try:
            cuts = CutList(recipe.val_tokens, recipe.target_tokens)
            for unit, tokens in _tokenised(pool, units, work / "units", in_flight=2 * workers):
                bar.update(sum(file.size_bytes for file in unit))
                cuts.add(tokens)
                if cuts.full:
                    break
            cuts.check_enough(recipe.source.description)
            shards = _write_shards(pool, recipe, cuts, work)
        except BrokenProcessPool:
            raise UserError(
                "a worker process died: killed for want of memory (lower data.workers), or called from a script whose "
                "work is not under `if __name__ == '__main__':`"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(work / "units")  # now that no worker writes there
    write_json(work / MANIFEST, _manifest(recipe, cuts, shards))


def make_units(files: Iterable[SourceFile], seed: int) -> Iterator[tuple[SourceFile, ...]]:
    """Files in a seeded order, small ones together. A function of the files' names and sizes and the seed alone."""
    ordered = sorted(
        files, key=lambda file: hashlib.sha256(f"{seed}\0{file.name}".encode(errors="surrogateescape")).digest()
    )
    unit: list[SourceFile] = []
    size_bytes = 0
    for file in ordered:
        unit.append(file)
        size_bytes += file.size_bytes
        if size_bytes >= UNIT_BYTES:
            yield tuple(unit)
            unit, size_bytes = [], 0
    if unit:
        yield tuple(unit)


def _tokenised(
    pool: Executor, units: list[tuple[SourceFile, ...]], folder: Path, in_flight: int
) -> Iterator[tuple[tuple[SourceFile, ...], UnitTokens]]:
    """Units with their tokens, in order; a bounded number are under way, so memory stays flat."""
    waiting: deque[tuple[tuple[SourceFile, ...], Future[UnitTokens]]] = deque()
    try:
        for number, unit in enumerate(units):
            waiting.append((unit, pool.submit(tokenize_unit, unit, folder / f"{number:06d}.bin")))
            if len(waiting) >= in_flight:
                first, future = waiting.popleft()
                yield first, future.result()
        for unit, future in waiting:
            yield unit, future.result()
    finally:  # where the caller wants no more, or something failed, the rest stops instead of running on
        (folder / STOP).touch()
        for _, future in waiting:
            future.cancel()


def _write_shards(pool: Executor, recipe: Recipe, cuts: CutList, work: Path) -> list[Shard]:
    """Shards from the unit files, in parallel."""
    jobs = [
        (split, f"{split}_{number:05d}.npy", spans)
        for split, all_spans in (("val", cuts.val), ("train", cuts.train))
        for number, spans in enumerate(cut_spans(all_spans, recipe.shard_tokens))
    ]
    futures = [pool.submit(write_shard, work / file, spans) for _, file, spans in jobs]
    return [
        Shard(file, split, sum(end - start for _, start, end in spans), future.result())
        for (split, file, spans), future in zip(jobs, futures, strict=True)
    ]


def _manifest(recipe: Recipe, cuts: CutList, shards: list[Shard]) -> dict[str, Any]:
    return {
        **recipe.describe(),
        "dtype": "uint16",
        "tokenizer": {
            "name": "r50k_base", "sha256": recipe.tokenizer_sha256, "vocab_size": 50_257, "end_of_text": 50_256
        },
        "counts": cuts.counts,
        "shards": [vars(shard) for shard in shards],
    }  # fmt: skip
