"""What a reader receives: the file to read, and the log of what it had to skip."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_LOGGED_SKIPS = 100
"""Per work item and reason; further ones are only counted."""


@dataclass
class SkipLog:
    """What was skipped or repaired, and where."""

    counts: Counter[str] = field(default_factory=Counter)
    """By reason."""
    places: list[dict[str, str]] = field(default_factory=list)

    def add(self, reason: str, place: str, detail: str = "") -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= MAX_LOGGED_SKIPS:
            self.places.append({"reason": reason, "place": place, "detail": " ".join(detail.split())[:200]})

    def merge(self, logged: dict[str, Any]) -> None:
        """Add the counts and places of another log."""
        self.counts.update(logged["counts"])
        self.places += logged["places"]


@dataclass(frozen=True)
class ReadTask:
    """One file to read, or one part of it."""

    path: Path
    name: str
    """Relative to the source, so that logs are the same on every machine."""
    column: str = "text"
    """Column or key that holds the text."""
    part: int = 0
    num_parts: int = 1

    def part_range(self, total: int) -> tuple[int, int]:
        """Start and end of this part among `total` units."""
        return total * self.part // self.num_parts, total * (self.part + 1) // self.num_parts
