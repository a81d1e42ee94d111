"""Which tokens go where: documents to validation or training, and the tokens of each split to shards.

Decided unit by unit, in the units' order, from the lengths and hashes of documents alone: no token passes through here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from .units import UnitIndex

Span = tuple[int, int, int]
"""Unit, and its tokens [start, end)."""


@dataclass
class ShardCutter:
    """Spans of one split, regrouped into shards of exactly `size` tokens; the last one is shorter."""

    split: str
    size: int
    spans: list[Span] = field(default_factory=list)
    """Of the shard that is being filled."""
    number: int = 0
    """Shards cut so far."""
    documents: int = 0
    """That begin in the shard that is being filled."""
    _filled: int = 0

    def add(self, unit: int, starts: np.ndarray, lengths: np.ndarray) -> Iterator["Cut"]:
        """Take documents; give every shard that they fill.

        Shapes:
            starts, lengths (documents,) int64, in tokens of the unit
        """
        ends = starts + lengths
        # Runs of documents with nothing dropped between them are one span.
        border = np.flatnonzero(starts[1:] != ends[:-1])
        first, last = np.append(0, border + 1)[: len(starts)], np.append(border, len(starts) - 1)[: len(starts)]
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            start, end = int(starts[a]), int(ends[b])
            while start < end:
                take = min(self.size - self._filled, end - start)
                begin, behind = np.searchsorted(starts[a : b + 1], (start, start + take)).tolist()
                self.documents += behind - begin
                self.spans.append((unit, start, start + take))
                self._filled += take
                start += take
                if self._filled == self.size:
                    yield self.finish()

    def finish(self) -> "Cut":
        """The shard that is being filled, as it is; the next one begins."""
        cut = Cut(self.split, self.number, self._filled, self.documents, tuple(self.spans))
        self.spans, self._filled, self.documents = [], 0, 0
        self.number += 1
        return cut


@dataclass(frozen=True)
class Cut:
    """One shard to be: which tokens, in order."""

    split: str
    number: int
    tokens: int
    documents: int
    """That begin in it."""
    spans: tuple[Span, ...]

    @property
    def file(self) -> str:
        return f"{self.split}_{self.number:05d}.npy"


class TooLittleText(UserError):
    """Nothing is left to train on."""


class CutList:
    """Which documents of which unit go into which shard.

    Validation takes the first documents until it has enough; training takes the rest, but for exact copies of a
    validation document, and, if asked, of any document before.
    """

    def __init__(
        self, val_tokens: int, shard_tokens: int, target_tokens: int | None, max_documents: int | None, dedup: bool
    ) -> None:
        self.counts = {
            "train_documents": 0, "train_tokens": 0, "val_documents": 0, "val_tokens": 0,
            "copies_of_validation_dropped": 0, "duplicates_dropped": 0,
        }  # fmt: skip
        self.val = ShardCutter("val", shard_tokens)
        self.train = ShardCutter("train", shard_tokens)
        self._val_tokens, self._target_tokens, self._max_documents = val_tokens, target_tokens, max_documents
        self._seen = HashSet() if dedup else None
        self._val_hashes = HashSet()
        self._val_done = False

    @property
    def full(self) -> bool:
        """Whether no further document is wanted."""
        wanted, counts = self._target_tokens, self.counts
        return self._room() == 0 or (wanted is not None and counts["train_tokens"] >= wanted)

    def add(self, number: int, unit: UnitIndex) -> Iterator[Cut]:
        """Deal out a unit's documents; give every shard that they fill."""
        starts = np.cumsum(unit.lengths) - unit.lengths
        val, train = self._choose(unit)
        yield from self.val.add(number, starts[val], unit.lengths[val])
        if self._val_done and self.val.spans:
            yield self.val.finish()
        yield from self.train.add(number, starts[train], unit.lengths[train])

    def finish(self) -> Iterator[Cut]:
        """The last shard."""
        if self.train.spans:
            yield self.train.finish()

    def _choose(self, unit: UnitIndex) -> tuple[np.ndarray, np.ndarray]:
        """Which of a unit's documents validation takes, and which training. All are counted, dropped ones too."""
        places = np.arange(len(unit.lengths))
        val = train = places[:0]
        if self.full:
            return val, train
        left = new = places if self._seen is None else self._seen.add_new(unit.hashes)
        if not self._val_done:
            n = min(self._until(unit.lengths[new], self._val_tokens - self.counts["val_tokens"]), self._val_room())
            val, left = new[:n], new[n:]
            self._val_hashes.add_new(unit.hashes[val])
            self._count("val", unit.lengths[val])
            self._val_done = self.counts["val_tokens"] >= self._val_tokens or self._val_room() == 0
        if self._val_done:
            fresh = left[~self._val_hashes.holds(unit.hashes[left])]
            wanted = self._target_tokens
            n = len(fresh)
            if wanted is not None:
                n = self._until(unit.lengths[fresh], wanted - self.counts["train_tokens"])
            train = fresh[: min(n, self._room())]
            self._count("train", unit.lengths[train])
        # What is behind the last document that is wanted is not looked at, in this unit or another.
        behind = int(max(val.max(initial=-1), train.max(initial=-1))) + 1 if self.full else len(places)
        self.counts["duplicates_dropped"] += behind - int(np.searchsorted(new, behind))
        if self._val_done:
            self.counts["copies_of_validation_dropped"] += int(np.searchsorted(left, behind)) - len(train)
        return val, train

    def _count(self, split: str, lengths: np.ndarray) -> None:
        self.counts[f"{split}_documents"] += len(lengths)
        self.counts[f"{split}_tokens"] += int(lengths.sum())

    @staticmethod
    def _until(lengths: np.ndarray, wanted: int) -> int:
        """How many documents reach so many tokens; all of them where they do not."""
        return min(int(np.searchsorted(np.cumsum(lengths), wanted)) + 1, len(lengths)) if wanted > 0 else 0

    def _room(self) -> int:
        """Documents that are still wanted."""
        if self._max_documents is None:
            return 1 << 62
        return max(self._max_documents - self.counts["train_documents"] - self.counts["val_documents"], 0)

    def _val_room(self) -> int:
        """Documents that validation may still take: of a limited number, a tenth."""
        if self._max_documents is None:
            return 1 << 62
        return max(self._max_documents // 10, 1) - self.counts["val_documents"]

    def check_enough(self, source: str, dropped: dict[str, int], places: Sequence[dict[str, str]] = ()) -> None:
        """
        Raises:
            TooLittleText: nothing to train on; `source` is its name for people, `dropped` what was passed over and why,
                `places` where.
        """
        counts = self.counts
        if counts["train_tokens"]:
            return
        total = counts["val_documents"] + counts["copies_of_validation_dropped"]
        why = "".join(f"; {count:,} x {reason.replace('_', ' ')}" for reason, count in dropped.items())
        if not total:
            where = "".join(f"\n  {place['place']}: {place['detail'] or place['reason']}" for place in places[:3])
            column = "; --text-column NAME chooses another column or key"
            advice = column if {"no_text", "no_text_column"} & set(dropped) else ""
            raise TooLittleText(f"the source {source} has no usable document{why}{advice}{where}")
        raise TooLittleText(
            f"the source {source} has {total} usable document(s) with {counts['val_tokens']:,} tokens{why}. "
            f"Validation alone takes {self._val_tokens:,}, which leaves nothing to train on; "
            "add text (at least two documents that differ), or lower data.val_tokens"
        )


class HashSet:
    """Many 64-bit hashes at 8 bytes each, as sorted runs that double in length."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which of them are in the set, (n,) bool."""
        found = np.zeros(len(hashes), dtype=bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[at] == hashes
        return found

    def add_new(self, hashes: np.ndarray) -> np.ndarray:
        """Add them; the places of those that were not there, each hash once, in order, (m,) int64."""
        fresh = np.flatnonzero(~self.holds(hashes))
        values, first = np.unique(hashes[fresh], return_index=True)
        if len(values):
            self._runs.append(values)
        while len(self._runs) > 1 and len(self._runs[-1]) * 2 >= len(self._runs[-2]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        return fresh[np.sort(first)]
