"""Which tokens go where: documents to validation or training, and the tokens of each split to shards.

Decided item by item, in order, from the lengths and hashes of documents alone: no token passes through here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from myllm.config import DataConfig

from .work_items import ItemIndex

Span = tuple[int, int, int]
"""The number of a work item, and its tokens [start, end)."""


@dataclass(frozen=True)
class ShardSpec:
    """A shard to write: its tokens, in order."""

    split: str
    number: int
    tokens: int
    documents: int
    """That begin in it."""
    spans: tuple[Span, ...]

    @property
    def file(self) -> str:
        return f"{self.split}_{self.number:05d}.npy"


@dataclass
class SplitWriter:
    """Regroups spans of one split into shards of exactly `size` tokens; the last one is shorter."""

    split: str
    size: int
    spans: list[Span] = field(default_factory=list)
    """Of the shard that is being filled, like `_tokens` and `_documents`."""
    _number: int = 0
    _tokens: int = 0
    _documents: int = 0

    def add(self, item: int, starts: np.ndarray, lengths: np.ndarray, beginning: bool = True) -> Iterator[ShardSpec]:
        """Add documents of an item. Yields every shard that they fill.

        Args:
            beginning: False for the rest of a document that began earlier.

        Shapes:
            starts, lengths (documents,) int64, in tokens of the item
        """
        ends = starts + lengths
        # Documents with nothing dropped between them are one span.
        gaps = np.flatnonzero(starts[1:] != ends[:-1])
        first, last = np.append(0, gaps + 1)[: len(starts)], np.append(gaps, len(starts) - 1)[: len(starts)]
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            start, end = int(starts[a]), int(ends[b])
            while start < end:
                taken = min(self.size - self._tokens, end - start)
                if beginning:
                    begin, behind = np.searchsorted(starts[a : b + 1], (start, start + taken)).tolist()
                    self._documents += behind - begin
                self.spans.append((item, start, start + taken))
                self._tokens += taken
                start += taken
                if self._tokens == self.size:
                    yield self.finish()

    def finish(self) -> ShardSpec:
        """The shard that is being filled, as it is. The next one begins."""
        shard = ShardSpec(self.split, self._number, self._tokens, self._documents, tuple(self.spans))
        self.spans, self._tokens, self._documents = [], 0, 0
        self._number += 1
        return shard


@dataclass(frozen=True)
class _Documents:
    """The documents of an item, and which of them may be used.

    Documents are named by their index in the item, in ascending arrays. An example, where validation takes document 1:

        index           0  1  2  3  4  5
        hashes          a  b  a  c  b  d
        distinct        0  1     3     5      the first of each hash: only these may be held out
        wanted          0  1  2  3  4  5      all; with dedup_exact, the distinct ones
        held out           1
        left            0     2  3  4  5      wanted, and not held out
        for training    0     2  3     5      left, and no copy of what is held out: 4 is one
    """

    item: int
    lengths: np.ndarray
    """Tokens of all the item's documents, (documents,) int64."""
    hashes: np.ndarray
    """(documents,) uint64."""
    wanted: np.ndarray
    distinct: np.ndarray
    """No copies of a document of an earlier item either."""

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths


class ShardPlanner:
    """Decides which documents of which item go into which shard.

    Validation takes the first documents, at most `val_tokens` and at most a tenth of the text and of the documents. A
    document longer than what is left of that goes to training. If this gives less than half of it, because documents
    are few or long, the end of the longest document is held out too. Training takes the rest, except exact copies of
    what is held out and, with `dedup_exact`, of any earlier document.

    To know what a tenth is, items are held back until there are ten times `val_tokens`, or the source ends.
    """

    def __init__(self, config: DataConfig) -> None:
        self.counts = {
            "train_documents": 0, "train_tokens": 0, "val_documents": 0, "val_tokens": 0, "documents_split": 0,
            "copies_of_validation_dropped": 0, "duplicates_dropped": 0,
        }  # fmt: skip
        self.val = SplitWriter("val", config.shard_tokens)
        self.train = SplitWriter("train", config.shard_tokens)
        self.target_tokens, self._max_documents = config.target_tokens, config.max_documents
        self._dedup = config.dedup_exact
        self._val_tokens = config.val_tokens
        if config.target_tokens is not None:  # a tenth of validation and training together
            self._val_tokens = min(config.val_tokens, config.target_tokens // 9)
        self._held_back: list[_Documents] = []
        self._chosen = False
        """Whether validation is chosen."""
        self.seen_documents = self.seen_tokens = 0
        """Until it is chosen: documents wanted, and tokens of the distinct ones."""
        self._seen = HashSet()
        self._val_hashes = HashSet()
        self._held_out: dict[int, np.ndarray] = {}
        """Indices of validation's documents, by item."""
        self._split_document: tuple[int, int, int] | None = None
        """Item, document, and how many tokens of its end are held out."""

    @property
    def full(self) -> bool:
        """Whether no further document is needed."""
        target, counts = self.target_tokens, self.counts
        enough = self._documents_left() == 0 or (target is not None and counts["train_tokens"] >= target)
        return self._chosen and (enough or not counts["val_tokens"])

    @property
    def first_item_needed(self) -> int | None:
        """The first item with tokens that are in no planned shard yet."""
        items = [item for item, _, _ in (*self.val.spans, *self.train.spans)]
        return min(items + [documents.item for documents in self._held_back], default=None)

    def add(self, number: int, index: ItemIndex) -> Iterator[ShardSpec]:
        """Assign an item's documents. Yields every shard that they fill."""
        if self.full:
            return
        every = np.arange(len(index.lengths))
        distinct = self._seen.add_new(index.hashes) if self._dedup or not self._chosen else every
        documents = _Documents(number, index.lengths, index.hashes, distinct if self._dedup else every, distinct)
        if self._chosen:
            yield from self._add_to_training(documents)
            return
        self._held_back.append(documents)
        self.seen_documents += len(documents.wanted)
        self.seen_tokens += int(index.lengths[distinct].sum())
        limit = self._max_documents
        if self.seen_tokens >= 10 * self._val_tokens or (limit is not None and self.seen_documents >= limit):
            yield from self._choose_validation()

    def finish(self) -> Iterator[ShardSpec]:
        """The last shards."""
        if not self._chosen:
            yield from self._choose_validation()
        if self.train.spans:
            yield self.train.finish()

    def _choose_validation(self) -> Iterator[ShardSpec]:
        """Hold out documents among those held back, and give the others to training."""
        yield from self._hold_out()
        if self.val.spans:
            yield self.val.finish()
        self._chosen = True
        if not self._dedup:
            self._seen = HashSet()
        held_back, self._held_back = self._held_back, []
        for documents in held_back:
            if not self.full:
                yield from self._add_to_training(documents)

    def _hold_out(self) -> Iterator[ShardSpec]:
        candidates = self._candidates()
        if not any(map(len, candidates)):
            return
        # The n candidates of all items in one row: (n,), each.
        indices = np.concatenate(candidates)
        lengths = np.concatenate([item.lengths[own] for item, own in zip(self._held_back, candidates, strict=True)])
        limit = min(self._val_tokens, int(lengths.sum()) // 10)
        chosen = _first_that_fit(lengths, limit, len(lengths) // 10)
        ends = np.cumsum([len(own) for own in candidates])  # of each item's part of the row
        for documents, own, is_chosen in zip(self._held_back, candidates, np.split(chosen, ends[:-1]), strict=True):
            if is_chosen.any():
                yield from self._hold_out_whole(documents, own[is_chosen])
        longest = int(np.argmax(lengths))
        if 2 * self.counts["val_tokens"] < limit and not chosen[longest]:
            documents = self._held_back[int(np.searchsorted(ends, longest, side="right"))]
            tokens = min(limit - self.counts["val_tokens"], int(lengths[longest]) // 2)
            yield from self._hold_out_end(documents, int(indices[longest]), tokens)

    def _candidates(self) -> list[np.ndarray]:
        """For each item that is held back: the distinct ones among its documents that `max_documents` allows."""
        room, candidates = self._documents_left(), []
        for documents in self._held_back:
            allowed = documents.wanted[:room]
            room -= len(allowed)
            candidates.append(np.intersect1d(documents.distinct, allowed, assume_unique=True))
        return candidates

    def _hold_out_whole(self, documents: _Documents, indices: np.ndarray) -> Iterator[ShardSpec]:
        self._held_out[documents.item] = indices
        self._val_hashes.add_new(documents.hashes[indices])
        self._count("val", documents.lengths[indices])
        yield from self.val.add(documents.item, documents.starts[indices], documents.lengths[indices])

    def _hold_out_end(self, documents: _Documents, index: int, tokens: int) -> Iterator[ShardSpec]:
        """Hold out the end of one document, after the end-of-text token that it begins with."""
        if tokens < 2:
            return
        self._split_document = (documents.item, index, tokens - 1)
        self._val_hashes.add_new(documents.hashes[[index]])
        self._count("val", np.array([tokens]))
        self.counts["documents_split"] += 1
        start, length = int(documents.starts[index]), int(documents.lengths[index])
        yield from self.val.add(documents.item, np.array([start]), np.array([1]))
        end = np.array([start + length - (tokens - 1)])
        yield from self.val.add(documents.item, end, np.array([tokens - 1]), beginning=False)

    def _add_to_training(self, documents: _Documents) -> Iterator[ShardSpec]:
        """Give training its documents of an item. All are counted, dropped ones too."""
        lengths = documents.lengths.copy()  # of what training takes of each document
        held_out = self._held_out.pop(documents.item, documents.wanted[:0])
        left = np.setdiff1d(documents.wanted, held_out, assume_unique=True)
        is_copy = self._val_hashes.holds(documents.hashes[left])  # (left,)
        if self._split_document and self._split_document[0] == documents.item:
            _, index, tokens = self._split_document
            is_copy[left == index] = False
            lengths[index] -= tokens
        train = self._until_target(left[~is_copy][: self._documents_left()], lengths)
        self._count("train", lengths[train])
        # Of the last item, only the documents up to the last one that is needed are looked at.
        seen = int(train.max(initial=-1)) + 1 if self.full else len(lengths)
        self.counts["duplicates_dropped"] += seen - int(np.searchsorted(documents.wanted, seen))
        self.counts["copies_of_validation_dropped"] += int(np.searchsorted(left, seen)) - len(train)
        yield from self.train.add(documents.item, documents.starts[train], lengths[train])

    def _until_target(self, train: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The first of these documents that meet the target. The last one is shortened in `lengths`, to the token."""
        if self.target_tokens is None:
            return train
        wanted_tokens = self.target_tokens - self.counts["train_tokens"]
        sums = np.cumsum(lengths[train])
        train = train[: int(np.searchsorted(sums, wanted_tokens)) + 1]
        if len(train) and (beyond := int(sums[len(train) - 1]) - wanted_tokens) > 0:
            lengths[train[-1]] -= beyond
        return train

    def _count(self, split: str, lengths: np.ndarray) -> None:
        self.counts[f"{split}_documents"] += len(lengths)
        self.counts[f"{split}_tokens"] += int(lengths.sum())

    def _documents_left(self) -> int:
        """How many documents are still wanted."""
        if self._max_documents is None:
            return 1 << 62
        counts = self.counts
        taken = counts["train_documents"] + counts["val_documents"] - counts["documents_split"]
        return max(self._max_documents - taken, 0)


def _first_that_fit(lengths: np.ndarray, max_tokens: int, max_documents: int) -> np.ndarray:
    """Which documents are the first that together are within the limits, (n,) bool.

    A document that is too long is skipped, unless nine tenths of the tokens are chosen already.
    """
    chosen = np.zeros(len(lengths), dtype=bool)
    left, count = max_tokens, 0
    for index, length in enumerate(lengths.tolist()):
        if count == max_documents:
            break
        if length <= left:
            chosen[index] = True
            left, count = left - length, count + 1
        elif 10 * left <= max_tokens:
            break
    return chosen


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
        """Add hashes. Returns the indices of those that were new, each hash once, in order, (m,) int64."""
        fresh = np.flatnonzero(~self.holds(hashes))
        values, first = np.unique(hashes[fresh], return_index=True)
        if len(values):
            self._runs.append(values)
        while len(self._runs) > 1 and len(self._runs[-1]) * 2 >= len(self._runs[-2]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        return fresh[np.sort(first)]
