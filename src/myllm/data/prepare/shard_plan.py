"""Which tokens go where: documents to validation or training, and the tokens of each split to shards.

Decided unit by unit, in the units' order, from the lengths and hashes of documents alone: no token passes through here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from myllm.errors import UserError

from .work_items import ItemIndex

Span = tuple[int, int, int]
"""Unit, and its tokens [start, end)."""


@dataclass
class SplitWriter:
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

    def add(self, unit: int, starts: np.ndarray, lengths: np.ndarray, beginning: bool = True) -> Iterator["ShardSpec"]:
        """Take documents; give every shard that they fill.

        Args:
            beginning: whether they begin there, or are what is left of one that began before.

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
                self.documents += behind - begin if beginning else 0
                self.spans.append((unit, start, start + take))
                self._filled += take
                start += take
                if self._filled == self.size:
                    yield self.finish()

    def finish(self) -> "ShardSpec":
        """The shard that is being filled, as it is; the next one begins."""
        cut = ShardSpec(self.split, self.number, self._filled, self.documents, tuple(self.spans))
        self.spans, self._filled, self.documents = [], 0, 0
        self.number += 1
        return cut


@dataclass(frozen=True)
class ShardSpec:
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


class NotEnoughText(UserError):
    """Nothing is left to train on."""


@dataclass(frozen=True)
class _Documents:
    """A unit's documents that may be dealt out."""

    unit: int
    lengths: np.ndarray
    """In tokens, of all the unit's documents, (documents,) int64."""
    hashes: np.ndarray
    wanted: np.ndarray
    """Which of them: all, or those that are no copies of an earlier one, (wanted,) int64."""
    distinct: np.ndarray
    """Those that are no copies of an earlier one."""


class ShardPlanner:
    """Which documents of which unit go into which shard.

    Validation takes the first documents, at most `val_tokens` and at most a tenth of the text and of the documents. One
    that is longer than what is left of that goes to training. Where documents are so long, or so few, that this gives
    less than half of it, the end of the longest one is held out too. Training takes the rest, but for exact copies of
    what is held out and, if asked, of any document before.

    A tenth of what is only known later: units wait until ten times `val_tokens` are there, or the source ends.
    """

    def __init__(
        self, val_tokens: int, shard_tokens: int, target_tokens: int | None, max_documents: int | None, dedup: bool
    ) -> None:
        self.counts = {
            "train_documents": 0, "train_tokens": 0, "val_documents": 0, "val_tokens": 0, "documents_split": 0,
            "copies_of_validation_dropped": 0, "duplicates_dropped": 0,
        }  # fmt: skip
        self.val = SplitWriter("val", shard_tokens)
        self.train = SplitWriter("train", shard_tokens)
        # Beside so many tokens to train on, a tenth of both together.
        self._val_tokens = val_tokens if target_tokens is None else min(val_tokens, target_tokens // 9)
        self._target_tokens, self._max_documents, self._dedup = target_tokens, max_documents, dedup
        self._waiting: list[_Documents] = []
        self._chosen = False
        """Whether it is decided what is held out."""
        self._seen_documents = self._seen_tokens = 0
        """Until then: how many are wanted, and how many tokens the distinct ones have."""
        self._seen = HashSet()
        self._val_hashes = HashSet()
        self._held_out: dict[int, np.ndarray] = {}
        """Documents of validation by unit."""
        self._split: tuple[int, int, int] | None = None
        """Unit, document, and how many tokens of its end are held out."""

    @property
    def full(self) -> bool:
        """Whether no further document is wanted."""
        wanted, counts = self._target_tokens, self.counts
        enough = self._room() == 0 or (wanted is not None and counts["train_tokens"] >= wanted)
        return self._chosen and (enough or not counts["val_tokens"])

    @property
    def waiting_unit(self) -> int | None:
        """The first unit that is not dealt out yet."""
        return self._waiting[0].unit if self._waiting else None

    def add(self, number: int, unit: ItemIndex) -> Iterator[ShardSpec]:
        """Deal out a unit's documents; give every shard that they fill."""
        if self.full:
            return
        every = np.arange(len(unit.lengths))
        distinct = self._seen.add_new(unit.hashes) if self._dedup or not self._chosen else every
        documents = _Documents(number, unit.lengths, unit.hashes, distinct if self._dedup else every, distinct)
        if self._chosen:
            yield from self._deal(documents)
            return
        self._waiting.append(documents)
        self._seen_documents += len(documents.wanted)
        self._seen_tokens += int(unit.lengths[distinct].sum())
        most = self._max_documents
        if self._seen_tokens >= 10 * self._val_tokens or (most is not None and self._seen_documents >= most):
            yield from self._begin()

    def finish(self) -> Iterator[ShardSpec]:
        """The last shards."""
        if not self._chosen:
            yield from self._begin()
        if self.train.spans:
            yield self.train.finish()

    def _begin(self) -> Iterator[ShardSpec]:
        """Decide what is held out, and deal out the units that waited for that."""
        yield from self._hold_out()
        self._chosen = True
        if not self._dedup:
            self._seen = HashSet()
        waiting, self._waiting = self._waiting, []
        for documents in waiting:
            if not self.full:
                yield from self._deal(documents)

    def _hold_out(self) -> Iterator[ShardSpec]:
        """Choose validation's documents among those that wait, and give its shards."""
        left = self._room()
        candidates: list[tuple[_Documents, np.ndarray]] = []
        for documents in self._waiting:
            within, left = documents.wanted[:left], left - min(left, len(documents.wanted))
            candidates.append((documents, np.intersect1d(documents.distinct, within, assume_unique=True)))
        lengths = [documents.lengths[places] for documents, places in candidates]
        every = np.concatenate([np.zeros(0, dtype=np.int64), *lengths])
        most = min(self._val_tokens, int(every.sum()) // 10)
        first = _first_that_fit(every, most, len(every) // 10)
        ends = np.cumsum([len(places) for _, places in candidates])
        for (documents, places), end in zip(candidates, ends.tolist(), strict=True):
            begin = end - len(places)
            here = first[np.searchsorted(first, begin) : np.searchsorted(first, end)]
            if len(here):
                yield from self._take_for_validation(documents, places[here - begin])
        short = most - self.counts["val_tokens"]
        if len(every) and 2 * self.counts["val_tokens"] < most:
            longest = int(np.argmax(every))
            at = int(np.searchsorted(ends, longest, side="right"))
            documents, places = candidates[at]
            place = int(places[longest - (int(ends[at]) - len(places))])
            if place not in self._held_out.get(documents.unit, ()):
                yield from self._split_for_validation(documents, place, min(short, int(every[longest]) // 2))
        if self.val.spans:
            yield self.val.finish()

    def _take_for_validation(self, documents: _Documents, places: np.ndarray) -> Iterator[ShardSpec]:
        self._held_out[documents.unit] = places
        self._val_hashes.add_new(documents.hashes[places])
        self._count("val", documents.lengths[places])
        yield from self.val.add(documents.unit, _starts(documents)[places], documents.lengths[places])

    def _split_for_validation(self, documents: _Documents, place: int, tokens: int) -> Iterator[ShardSpec]:
        """Hold out the end of one document, behind the end-of-text token that it begins with."""
        if tokens < 2:
            return
        self._split = (documents.unit, place, tokens - 1)
        self._val_hashes.add_new(documents.hashes[[place]])
        self._count("val", np.array([tokens]))
        self.counts["documents_split"] += 1
        start, length = int(_starts(documents)[place]), int(documents.lengths[place])
        yield from self.val.add(documents.unit, np.array([start]), np.array([1]))
        end = np.array([start + length - (tokens - 1)])
        yield from self.val.add(documents.unit, end, np.array([tokens - 1]), beginning=False)

    def _deal(self, documents: _Documents) -> Iterator[ShardSpec]:
        """Give training its documents of a unit. All are counted, dropped ones too."""
        lengths, held_out = documents.lengths.copy(), self._held_out.pop(documents.unit, documents.wanted[:0])
        left = np.setdiff1d(documents.wanted, held_out, assume_unique=True)
        copies = self._val_hashes.holds(documents.hashes[left])
        if self._split and self._split[0] == documents.unit:
            _, place, tokens = self._split
            copies[left == place] = False
            lengths[place] -= tokens
        fresh = left[~copies]
        train = fresh[: self._room()]
        if self._target_tokens is not None:
            wanted = self._target_tokens - self.counts["train_tokens"]
            sums = np.cumsum(lengths[train])
            train = train[: int(np.searchsorted(sums, wanted)) + 1]
            if len(train) and (beyond := int(sums[len(train) - 1]) - wanted) > 0:
                lengths[train[-1]] -= beyond  # the target is met to the token
        self._count("train", lengths[train])
        # What is behind the last document that is wanted is not looked at, in this unit or another.
        behind = int(train.max(initial=-1)) + 1 if self.full else len(lengths)
        self.counts["duplicates_dropped"] += behind - int(np.searchsorted(documents.wanted, behind))
        self.counts["copies_of_validation_dropped"] += int(np.searchsorted(left, behind)) - len(train)
        yield from self.train.add(documents.unit, _starts(documents)[train], lengths[train])

    def _count(self, split: str, lengths: np.ndarray) -> None:
        self.counts[f"{split}_documents"] += len(lengths)
        self.counts[f"{split}_tokens"] += int(lengths.sum())

    def _room(self) -> int:
        """Documents that are still wanted."""
        if self._max_documents is None:
            return 1 << 62
        counts = self.counts
        taken = counts["train_documents"] + counts["val_documents"] - counts["documents_split"]
        return max(self._max_documents - taken, 0)

    def check_enough(self, source: str, dropped: dict[str, int], places: Sequence[dict[str, str]] = ()) -> None:
        """
        Raises:
            NotEnoughText: nothing to train on; `source` is its name for people, `dropped` what was passed over and why,
                `places` where.
        """
        if self.counts["train_tokens"]:
            return
        why = "".join(f"; {count:,} x {reason.replace('_', ' ')}" for reason, count in dropped.items())
        if not self._seen_documents:
            where = "".join(f"\n  {place['place']}: {place['detail'] or place['reason']}" for place in places[:3])
            column = "; --text-column NAME chooses another column or key"
            advice = column if {"no_text", "no_text_column"} & set(dropped) else ""
            raise NotEnoughText(f"the source {source} has no usable document{why}{advice}{where}")
        limits = "" if self._target_tokens is None else f", of which data.target_tokens takes {self._target_tokens:,}"
        raise NotEnoughText(
            f"the source {source} has {self._seen_documents:,} usable document(s) with {self._seen_tokens:,} tokens"
            f"{limits}{why}. Validation takes at most a tenth and needs two tokens; add text"
            + (", or raise data.target_tokens" if limits else "")
        )


def _first_that_fit(lengths: np.ndarray, tokens: int, documents: int) -> np.ndarray:
    """The first documents that have at most so many tokens together, and are at most so many, (n,) int64.

    A longer one is passed over, unless nine tenths are there already.
    """
    chosen, left = [], tokens
    for place, length in enumerate(lengths.tolist()):
        if len(chosen) == documents:
            break
        if length <= left:
            chosen.append(place)
            left -= length
        elif 10 * left <= tokens:
            break
    return np.array(chosen, dtype=np.int64)


def _starts(documents: _Documents) -> np.ndarray:
    """Where each document begins in its unit."""
    return np.cumsum(documents.lengths) - documents.lengths


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
