"""Tokens of finished work items to shards, in their final order, while later items are still being tokenized.

`progress.json` lists the shards that are final: training may read those. An item's tokens are deleted once every shard
that holds some of them is listed.
"""

import hashlib
import io
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from myllm.data.dataset import MANIFEST, PROGRESS, SPANS
from myllm.data.token_stream import Shard
from myllm.errors import UserError
from myllm.files import atomic_write, read_json, write_json, write_text

from .shard_plan import ShardPlanner, ShardSpec
from .spec import DatasetSpec
from .work_items import load_item_index, tokens_path

COPY_BYTES = 1 << 20
MAX_WRITING = 8
"""Planned shards that are not written yet, before planning waits."""
MAX_LOGGED_SKIPS = 10_000
"""Per data set; further ones are only counted."""


def write_shard(path: Path, spans: list[tuple[Path, int, int]], dtype: np.dtype[Any]) -> str:
    """Copy spans of token files into one .npy file, which gets its name when it is complete. Returns its sha256.

    With plain writes, not a memory map: on a full disk a map ends the process with SIGBUS, a write raises.
    """
    digest = hashlib.sha256()
    tokens = sum(end - start for _, start, end in spans)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)})
    with atomic_write(path) as file:
        for chunk in _chunks(header.getvalue(), spans, dtype.itemsize):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _chunks(header: bytes, spans: list[tuple[Path, int, int]], token_bytes: int) -> Iterator[bytes]:
    """A shard's bytes, a little at a time."""
    yield header
    for path, start, end in spans:
        with path.open("rb") as file:
            file.seek(token_bytes * start)
            left = token_bytes * (end - start)
            while left:
                chunk = file.read(min(left, COPY_BYTES))
                assert chunk, f"{path} is shorter than before"
                yield chunk
                left -= len(chunk)


class NotEnoughText(UserError):
    """No text is left to train on."""


class ShardWriter:
    """Plans the shards of one data set and has them written. Runs in one process, which sees no token."""

    def __init__(self, spec: DatasetSpec, work: Path, pool: Executor) -> None:
        self.plan = ShardPlanner(spec.config)
        self.skipped: Counter[str] = Counter()
        self.skipped_places: list[dict[str, str]] = []
        self._spec, self._folder, self._work, self._pool = spec, spec.folder, work, pool
        self._listed = finished_shards(spec)
        """By an earlier call, and by this one."""
        self._planned = 0
        self._writing: deque[tuple[ShardSpec, Future[str]]] = deque()
        self._spans: list[tuple[int, int, int, int]] = []
        self._items_added = self._items_deleted = 0
        self._source_bytes = 0
        """Of the items added."""

    def add(self, number: int, size_bytes: int) -> None:
        """Assign the documents of the next work item, which stands for `size_bytes` of the source."""
        index = load_item_index(self._work, number)
        self.skipped.update(index.skips.counts)
        self.skipped_places += index.skips.places[: MAX_LOGGED_SKIPS - len(self.skipped_places)]
        self._source_bytes += size_bytes
        for shard in self.plan.add(number, index):
            self._write(shard)
        self._items_added = number + 1
        self.list_written()

    def finish(self) -> None:
        """Write the rest, and the manifest, which makes the data set complete. Raises as `check_enough`."""
        for shard in self.plan.finish():
            self._write(shard)
        check_enough(self.plan, self._spec.source.description, self.skipped, self.skipped_places)
        self.list_written(wait_for_all=True)
        with atomic_write(self._folder / SPANS) as file:
            np.save(file, np.array(self._spans, dtype=np.int64).reshape(-1, 4))
        if self.skipped_places:
            rows = (json.dumps(place, ensure_ascii=True) for place in self.skipped_places)
            write_text(self._folder / "passed_over.jsonl", "".join(f"{row}\n" for row in rows))
        counts = {**self.plan.counts, "passed_over": dict(sorted(self.skipped.items()))}
        self._write_manifest(MANIFEST, {"dtype": self._spec.tokenizer.dtype.name, "counts": counts})

    def list_written(self, wait_for_all: bool = False) -> None:
        """List the shards that are written in progress.json, in order."""
        before = len(self._listed)
        while self._writing and (wait_for_all or self._writing[0][1].done() or len(self._writing) > MAX_WRITING):
            shard, sha256 = self._writing.popleft()
            self._listed.append(Shard(shard.file, shard.split, shard.tokens, shard.documents, sha256.result()))
        if len(self._listed) > before:
            progress = {"done_bytes": self._source_bytes, "source_bytes": self._spec.source.size_bytes}
            self._write_manifest(PROGRESS, {"progress": progress})
        self._delete_copied_tokens()

    def _write_manifest(self, name: str, values: dict[str, Any]) -> None:
        description = {"fingerprint": self._spec.fingerprint, **self._spec.describe()}
        write_json(self._folder / name, {**description, **values, "shards": [vars(shard) for shard in self._listed]})

    def _write(self, shard: ShardSpec) -> None:
        self._spans += [(self._planned, *span) for span in shard.spans]
        self._planned += 1
        if self._planned <= len(self._listed):
            return  # written by an earlier call
        spans = [(tokens_path(self._work, item), start, end) for item, start, end in shard.spans]
        if missing := sorted({path for path, _, _ in spans if not path.exists()}):
            for path in missing:
                path.with_suffix(".npz").unlink(missing_ok=True)
            raise UserError(f"{missing[0]} is missing; run the same command again to rebuild it")
        dtype = self._spec.tokenizer.dtype
        self._writing.append((shard, self._pool.submit(write_shard, self._folder / shard.file, spans, dtype)))

    def _delete_copied_tokens(self) -> None:
        """Delete the tokens of items that are not read again."""
        needed = [item for shard, _ in self._writing for item, _, _ in shard.spans]
        if (planned := self.plan.first_item_needed) is not None:
            needed.append(planned)
        end = min(needed, default=self._items_added)
        for number in range(self._items_deleted, end):
            tokens_path(self._work, number).unlink(missing_ok=True)
        self._items_deleted = max(self._items_deleted, end)


def finished_shards(spec: DatasetSpec) -> list[Shard]:
    """The shards that an earlier call listed; none if any of them is damaged."""
    try:
        progress = read_json(spec.folder / PROGRESS)
        shards = [Shard(**shard) for shard in progress["shards"]]
        width = spec.tokenizer.dtype.itemsize
        intact = all((spec.folder / shard.file).stat().st_size > width * shard.tokens for shard in shards)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return shards if intact and progress["fingerprint"] == spec.fingerprint else []


def check_enough(
    plan: ShardPlanner, source: str, skipped: dict[str, int], places: Sequence[dict[str, str]] = ()
) -> None:
    """Raises NotEnoughText if there is nothing to train on, with how many documents were skipped and why."""
    if plan.counts["train_tokens"]:
        return
    reasons = "".join(f"; {count:,} x {reason.replace('_', ' ')}" for reason, count in skipped.items())
    if not plan.seen_documents:
        first = "".join(f"\n  {place['place']}: {place['detail'] or place['reason']}" for place in places[:3])
        column = "; --text-column NAME chooses another column or key"
        advice = column if {"no_text", "no_text_column"} & set(skipped) else ""
        raise NotEnoughText(f"the source {source} has no usable document{reasons}{advice}{first}")
    limits = "" if plan.target_tokens is None else f", of which data.target_tokens takes {plan.target_tokens:,}"
    raise NotEnoughText(
        f"the source {source} has {plan.seen_documents:,} usable document(s) with {plan.seen_tokens:,} tokens"
        f"{limits}{reasons}. Validation takes at most a tenth and needs two tokens; add text"
        + (", or raise data.target_tokens" if limits else "")
    )
