"""Text to shards: tokenise in parallel processes, hold out validation, write, hash, rename.

    source files ─▶ seeded order ─▶ units ─▶ [worker: read, tokenise] ─▶ unit files ─┐
                                                                                     ▼
                       shards ◀─ [worker: copy, hash] ◀─ cut list ◀─ documents in order: val first, then train

Work is cut into units by the order of the source's files alone, and the cut list is made in that order, so the bytes do
not depend on the number of workers. Everything happens in a temporary folder that gets its name when it is whole.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import paths
from ..config import DataConfig
from ..errors import UserError
from ..files import fsync_folder, locked, out_of_space, write_json
from ..hardware import available_cores
from . import sources
from .shards import FORMAT, MANIFEST, Dataset, Shard, find_dataset
from .sources import Source, SourceFile
from .tokenize_unit import UnitTokens, tokenize_unit, write_shard
from .tokenizer import Tokenizer

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
    if (recipe.folder / MANIFEST).is_file():
        return Dataset.open(recipe.folder)
    paths.datasets().mkdir(parents=True, exist_ok=True)
    with locked(paths.datasets() / f".{recipe.folder.name}.lock"):
        if (recipe.folder / MANIFEST).is_file():  # another process made it meanwhile
            return Dataset.open(recipe.folder)
        _check_disk(recipe)
        with _whole_or_nothing(recipe.folder) as work:
            _build(recipe, work, config.workers or available_cores(), progress)
    return Dataset.open(recipe.folder)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A work folder that becomes `folder` if the body succeeds, and vanishes if it does not."""
    work = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed preparation; the lock is ours
    work.mkdir()
    try:
        yield work
        fsync_folder(work)
        work.rename(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        if out_of_space(error):
            raise UserError(
                f"no room to write the data set under {folder.parent}: {error.strerror}; nothing was kept. "
                "Free some space, or set MYLLM_DATA to a folder on a larger disk"
            ) from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_disk(recipe: Recipe) -> None:
    tokens = recipe.source.size_bytes / BYTES_PER_TOKEN
    if recipe.target_tokens:
        tokens = min(tokens, recipe.target_tokens + recipe.val_tokens)
    need = int(4 * tokens)  # two bytes a token, once as unit files and once as shards
    free = shutil.disk_usage(paths.datasets()).free
    if need > free:
        raise UserError(
            f"the data set needs about {need / 1e9:.1f} GB under {paths.datasets()}, which has {free / 1e9:.1f} GB "
            "free; free some space, set MYLLM_DATA to a folder on a larger disk, or lower data.target_tokens"
        )


def _build(recipe: Recipe, work: Path, workers: int, progress: bool) -> None:
    units = list(make_units(recipe.source.files, recipe.shuffle_seed))
    (work / "units").mkdir()
    bar = tqdm(
        total=recipe.source.size_bytes, desc="tokenising", unit="B", unit_scale=True, disable=not progress, leave=False
    )
    # spawn: a forked child would inherit the parent's threads' locks.
    with bar, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            cuts = CutList(recipe)
            for unit, tokens in _tokenised(pool, units, work, in_flight=2 * workers):
                bar.update(sum(file.size_bytes for file in unit))
                cuts.add(tokens)
                if cuts.full:
                    break
            cuts.check_enough()
            _write(pool, recipe, cuts, work)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, most likely for want of memory; lower data.workers and try again"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def make_units(files: Iterable[SourceFile], seed: int) -> Iterator[tuple[SourceFile, ...]]:
    """Files in a seeded order, small ones together. A function of the files' names and sizes and the seed alone."""
    ordered = sorted(
        files, key=lambda file: hashlib.sha256(f"{seed}\0{file.name}".encode(errors="surrogateescape")).digest()
    )
    unit: list[SourceFile] = []
    for file in ordered:
        unit.append(file)
        if sum(each.size_bytes for each in unit) >= UNIT_BYTES:
            yield tuple(unit)
            unit = []
    if unit:
        yield tuple(unit)


def _tokenised(
    pool: Executor, units: list[tuple[SourceFile, ...]], work: Path, in_flight: int
) -> Iterator[tuple[tuple[SourceFile, ...], UnitTokens]]:
    """Units with their tokens, in order; a bounded number are under way, so memory stays flat."""
    waiting: deque[tuple[tuple[SourceFile, ...], Future[UnitTokens]]] = deque()
    for number, unit in enumerate(units):
        waiting.append((unit, pool.submit(tokenize_unit, unit, work / "units" / f"{number:06d}.bin")))
        if len(waiting) >= in_flight:
            first, future = waiting.popleft()
            yield first, future.result()
    for unit, future in waiting:
        yield unit, future.result()


@dataclass
class CutList:
    """Which tokens of which unit go into which split, decided document by document in the units' order.

    Validation takes the first documents until it has enough; training takes the rest, but for exact copies of a
    validation document.
    """

    recipe: Recipe
    val: list[tuple[Path, int, int]] = field(default_factory=list)
    train: list[tuple[Path, int, int]] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: {
            "train_documents": 0, "train_tokens": 0, "val_documents": 0, "val_tokens": 0,
            "copies_of_validation_dropped": 0, "empty_documents_dropped": 0,
        }
    )  # fmt: skip
    _val_hashes: set[int] = field(default_factory=set)

    @property
    def full(self) -> bool:
        target = self.recipe.target_tokens
        return target is not None and self.counts["train_tokens"] >= target

    def add(self, unit: UnitTokens) -> None:
        self.counts["empty_documents_dropped"] += unit.empty
        start = 0
        for length, digest in zip(unit.lengths.tolist(), unit.hashes.tolist(), strict=True):
            if self.full:
                return
            if self.counts["val_tokens"] < self.recipe.val_tokens:
                self._val_hashes.add(digest)
                self._take("val", unit.path, start, length)
            elif digest in self._val_hashes:
                self.counts["copies_of_validation_dropped"] += 1
            else:
                self._take("train", unit.path, start, length)
            start += length

    def _take(self, split: str, path: Path, start: int, length: int) -> None:
        spans = self.train if split == "train" else self.val
        if spans and spans[-1][0] == path and spans[-1][2] == start:
            spans[-1] = (path, spans[-1][1], start + length)  # joins the span before it
        else:
            spans.append((path, start, start + length))
        self.counts[f"{split}_documents"] += 1
        self.counts[f"{split}_tokens"] += length

    def check_enough(self) -> None:
        counts = self.counts
        if not counts["train_tokens"]:
            total = counts["val_documents"] + counts["copies_of_validation_dropped"]
            raise UserError(
                f"the source {self.recipe.source.description} has {total} document(s) with {counts['val_tokens']:,} "
                f"tokens and validation alone takes {self.recipe.val_tokens:,}, which leaves nothing to train on; "
                "add text (at least two documents), or lower data.val_tokens"
            )


def _write(pool: Executor, recipe: Recipe, cuts: CutList, work: Path) -> None:
    """Shards from the unit files, in parallel, then the manifest."""
    jobs = [
        (split, f"{split}_{number:05d}.npy", spans)
        for split, all_spans in (("val", cuts.val), ("train", cuts.train))
        for number, spans in enumerate(cut_spans(all_spans, recipe.shard_tokens))
    ]
    futures = [pool.submit(write_shard, work / file, spans) for _, file, spans in jobs]
    shards = [
        Shard(file, split, sum(end - start for _, start, end in spans), future.result())
        for (split, file, spans), future in zip(jobs, futures, strict=True)
    ]
    shutil.rmtree(work / "units")
    tokenizer = {"name": "r50k_base", "sha256": recipe.tokenizer_sha256, "vocab_size": 50_257, "end_of_text": 50_256}
    manifest = {
        **recipe.describe(),
        "dtype": "uint16",
        "tokenizer": tokenizer,
        "counts": cuts.counts,
        "shards": [vars(shard) for shard in shards],
    }
    write_json(work / MANIFEST, manifest)


def cut_spans(spans: list[tuple[Path, int, int]], size: int) -> Iterator[list[tuple[Path, int, int]]]:
    """Spans of tokens regrouped into lists of `size` tokens each, the last one shorter."""
    group: list[tuple[Path, int, int]] = []
    room = size
    for path, start, end in spans:
        while start < end:
            take = min(room, end - start)
            group.append((path, start, start + take))
            start, room = start + take, room - take
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group


def document_starts(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Where documents begin in a stream.

    Shapes:
        tokens (n,); returns (documents,) int64
    """
    return np.flatnonzero(tokens == end_of_text)
