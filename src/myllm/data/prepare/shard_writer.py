"""Finished units to shards, in their final order, while later units are still being made.

`progress.json` lists the shards that are sealed: training may read those. A unit's tokens are deleted once every shard
that holds some of them is on the list.
"""

import hashlib
import io
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from myllm.data.dataset import MANIFEST, PROGRESS, SPANS, Shard
from myllm.errors import UserError
from myllm.files import atomic_write, read_json, write_json, write_text

from .shard_plan import ShardPlanner, ShardSpec
from .spec import DatasetSpec
from .work_items import load_item_index, tokens_path

COPY_BYTES = 1 << 20
NAMED_FAULTS = 10_000
"""Places named a data set; the rest are counted only."""


def write_shard(path: Path, spans: list[tuple[Path, int, int]]) -> str:
    """Copy spans of unit files into one .npy file, which has its name only when it is whole.

    Plain writes, not a memory map: on a full disk a map ends the process with SIGBUS, a write raises.

    Returns:
        the file's sha256
    """
    digest = hashlib.sha256()
    tokens = sum(end - start for _, start, end in spans)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    with atomic_write(path) as file:
        for part in _parts(header.getvalue(), spans):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _parts(header: bytes, spans: list[tuple[Path, int, int]]) -> Iterator[bytes]:
    """A shard's bytes in pieces small enough to hold."""
    yield header
    for unit, start, end in spans:
        with unit.open("rb") as file:
            file.seek(2 * start)
            left = 2 * (end - start)
            while left:
                part = file.read(min(left, COPY_BYTES))
                assert part, f"{unit} is shorter than it was"
                yield part
                left -= len(part)


class ShardWriter:
    """The shards of one data set as they come into being. One process, which sees no token."""

    def __init__(self, recipe: DatasetSpec, folder: Path, units: Path, pool: Executor) -> None:
        config = recipe.config
        self.cuts = ShardPlanner(
            config.val_tokens, config.shard_tokens, config.target_tokens, config.max_documents, config.dedup_exact
        )
        self.passed_over: Counter[str] = Counter()
        self._recipe, self._folder, self._units, self._pool = recipe, folder, units, pool
        self._sealed = finished_shards(folder, recipe.fingerprint)
        """By an earlier call, and by this one."""
        self._cut = 0
        self._writing: deque[tuple[ShardSpec, Future[str]]] = deque()
        self._spans: list[tuple[int, int, int, int]] = []
        self.places: list[dict[str, str]] = []
        self._consumed = self._released = 0
        self._done_bytes = 0

    def add(self, number: int, size_bytes: int) -> None:
        """Deal out the documents of the next unit, which stands for so many bytes of the source."""
        index = load_item_index(self._units, number)
        self.passed_over.update(index.faults.counts)
        self.places += index.faults.places[: NAMED_FAULTS - len(self.places)]
        self._done_bytes += size_bytes
        for cut in self.cuts.add(number, index):
            self._write(cut)
        self._consumed = number + 1
        self.settle()

    def finish(self) -> None:
        """Write what is left, and the manifest: from now on it is a data set.

        Raises:
            NotEnoughText: nothing to train on.
        """
        for cut in self.cuts.finish():
            self._write(cut)
        self.cuts.check_enough(self._recipe.source.description, self.passed_over, self.places)
        self.settle(all_of_them=True)
        _save_spans(self._folder / SPANS, self._spans)
        if self.places:
            rows = (json.dumps(place, ensure_ascii=True) for place in self.places)
            write_text(self._folder / "passed_over.jsonl", "".join(f"{row}\n" for row in rows))
        counts = {**self.cuts.counts, "passed_over": dict(sorted(self.passed_over.items()))}
        manifest = {**self._description(), "dtype": "uint16", "counts": counts, **self._shards()}
        write_json(self._folder / MANIFEST, manifest)

    def settle(self, all_of_them: bool = False) -> None:
        """Put shards that are written on the list, in order."""
        before = len(self._sealed)
        while self._writing and (all_of_them or self._writing[0][1].done() or len(self._writing) > 8):
            cut, future = self._writing.popleft()
            self._sealed.append(Shard(cut.file, cut.split, cut.tokens, cut.documents, future.result()))
        if len(self._sealed) > before:
            progress = {"done_bytes": self._done_bytes, "source_bytes": self._recipe.source.size_bytes}
            write_json(self._folder / PROGRESS, {**self._description(), "progress": progress, **self._shards()})
        self._release()

    def _write(self, cut: ShardSpec) -> None:
        self._spans += [(self._cut, *span) for span in cut.spans]
        self._cut += 1
        if self._cut <= len(self._sealed):
            return  # by an earlier call
        spans = [(tokens_path(self._units, unit), start, end) for unit, start, end in cut.spans]
        if lost := sorted({path for path, _, _ in spans if not path.exists()}):
            for path in lost:  # no longer sealed
                path.with_suffix(".npz").unlink(missing_ok=True)
            raise UserError(f"{lost[0]} is gone: the same command makes it again")
        self._writing.append((cut, self._pool.submit(write_shard, self._folder / cut.file, spans)))

    def _release(self) -> None:
        """Delete the tokens of units that nothing will read any more."""
        needed = [span for cut, _ in self._writing for span in cut.spans]
        needed += self.cuts.val.spans + self.cuts.train.spans
        behind = min((unit for unit, _, _ in needed), default=self._consumed)
        if self.cuts.waiting_unit is not None:
            behind = min(behind, self.cuts.waiting_unit)
        for number in range(self._released, behind):
            tokens_path(self._units, number).unlink(missing_ok=True)
        self._released = max(self._released, behind)

    def _description(self) -> dict[str, Any]:
        return {"fingerprint": self._recipe.fingerprint, **self._recipe.describe()}

    def _shards(self) -> dict[str, Any]:
        return {"shards": [vars(shard) for shard in self._sealed]}


def finished_shards(folder: Path, fingerprint: str) -> list[Shard]:
    """The shards that an earlier call finished; none if any of them is not what it was."""
    try:
        progress = read_json(folder / PROGRESS)
        shards = [Shard(**shard) for shard in progress["shards"]]
        intact = all((folder / shard.file).stat().st_size > 2 * shard.tokens for shard in shards)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return shards if intact and progress["fingerprint"] == fingerprint else []


def _save_spans(path: Path, spans: Iterable[tuple[int, int, int, int]]) -> None:
    with atomic_write(path) as file:
        np.save(file, np.array(list(spans), dtype=np.int64).reshape(-1, 4))
