"""Which tokens go where: documents to validation or training, and the tokens of each split to shards."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .tokenize_unit import UnitTokens

Span = tuple[Path, int, int]
"""Tokens [start, end) of a unit file."""


@dataclass
class CutList:
    """Which tokens of which unit go into which split, decided document by document in the units' order.

    Validation takes the first documents until it has enough; training takes the rest, but for exact copies of a
    validation document.
    """

    val_tokens: int
    """Wanted; the document that reaches them is the last."""
    target_tokens: int | None
    """Wanted for training, None: all. The document that reaches them is the last."""
    val: list[Span] = field(default_factory=list)
    train: list[Span] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: {
            "train_documents": 0, "train_tokens": 0, "val_documents": 0, "val_tokens": 0,
            "copies_of_validation_dropped": 0, "empty_documents_dropped": 0,
        }
    )  # fmt: skip
    _val_hashes: set[int] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.target_tokens is not None and self.counts["train_tokens"] >= self.target_tokens

    def add(self, unit: UnitTokens) -> None:
        self.counts["empty_documents_dropped"] += unit.empty
        start = 0
        for length, digest in zip(unit.lengths.tolist(), unit.hashes.tolist(), strict=True):
            if self.full:
                return
            if self.counts["val_tokens"] < self.val_tokens:
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

    def check_enough(self, source: str) -> None:
        """
        Raises:
            UserError: nothing to train on; `source` is its name for people.
        """
        counts = self.counts
        if not counts["train_tokens"]:
            total = counts["val_documents"] + counts["copies_of_validation_dropped"]
            raise UserError(
                f"the source {source} has {total} document(s) with {counts['val_tokens']:,} "
                f"tokens and validation alone takes {self.val_tokens:,}, which leaves nothing to train on; "
                "add text (at least two documents that differ), or lower data.val_tokens"
            )


def cut_spans(spans: list[Span], size: int) -> Iterator[list[Span]]:
    """Spans of tokens regrouped into lists of `size` tokens each, the last one shorter."""
    group: list[Span] = []
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
