"""What a reader is asked for, and what it has to say beside the text."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MAX_LOGGED_SKIPS = 100
"""Places named a unit of work and reason; the rest are counted only."""


@dataclass
class SkipLog:
    """What was passed over or repaired, and where."""

    counts: Counter[str] = field(default_factory=Counter)
    places: list[dict[str, str]] = field(default_factory=list)

    def add(self, reason: str, place: str, detail: str = "") -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= MAX_LOGGED_SKIPS:
            self.places.append({"reason": reason, "place": place, "detail": " ".join(detail.split())[:200]})


@dataclass(frozen=True)
class ReadTask:
    """One file to read, or one part of it."""

    path: Path
    name: str
    """How faults name the file: relative to its source, the same on every machine."""
    column: str = "text"
    """Column or key that holds the text."""
    part: int = 0
    parts: int = 1

    def share(self, total: int) -> tuple[int, int]:
        """This part's share of so many things: first, and one behind the last."""
        return total * self.part // self.parts, total * (self.part + 1) // self.parts
