"""Numbers as text: sizes, counts, percentages and durations to show, and amounts that users type (10GB, 10BT)."""

import math
import re
from collections.abc import Collection, Sequence

from .errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_NUMBER = r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)"


def parse_count(text: str) -> int:
    """ "10BT", "500M", "2.5e9" or "1_000_000" as a whole number.

    Raises:
        UserError: anything else.
    """
    # "10T" is not ten tokens: T means tokens only after another letter.
    found = re.fullmatch(rf"{_NUMBER}\s*([KMBGT]?)T?", text.strip(), re.IGNORECASE)
    value = _scaled(found) if found else 0.5
    if not value.is_integer():  # false for infinity, too
        raise UserError(f"invalid number {text!r}: expected a whole number, for example 10BT, 500M or 1000000")
    return int(value)


def parse_target(text: str) -> tuple[str, float]:
    """ "10GB" as ("bytes", 1e10), "10BT" as ("tokens", 1e10).

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(rf"{_NUMBER}\s*(?:([KMGT]?)B|([KMGTB]?)T)", text.strip(), re.IGNORECASE)
    value = _scaled(found) if found else 0
    if not found or not 0 < value < math.inf:
        raise UserError(f"--target {text!r}: expected bytes of text such as 10GB, or tokens such as 10BT")
    return ("bytes" if text.strip()[-1] in "bB" else "tokens"), value


def _scaled(found: re.Match[str]) -> float:
    letters = [letter for letter in found.groups()[1:] if letter is not None]
    return float(re.sub("[_,]", "", found[1])) * _UNITS[letters[0].upper()]


def format_bytes(n_bytes: float) -> str:
    """1234567890 as "1.2 GB"; less than 1e9 in MB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def format_gib(n_bytes: float) -> str:
    """Memory in GiB: "1.23 GiB"."""
    return f"{n_bytes / 2**30:.2f} GiB"


def format_si(value: float, digits: int = 3) -> str:
    """1234567 as 1.23M. 1e9 is B, as is usual for tokens and parameters."""
    if not math.isfinite(value):
        return format_number(value)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # Round first: 999,999 is 1M, not 1000k.
        if abs(float(f"{value:.{digits}g}")) >= size:
            return f"{float(f'{value / size:.{digits}g}'):g}{unit}"
    return f"{float(f'{value:.{digits}g}'):g}"


def format_number(value: float) -> str:
    """Three significant digits: 3.31, 0.0021, 6e-5, NaN."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e") if abs(value) < 1_000 else format_si(value)


def format_percent(value: float) -> str:
    return f"{value * 100:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else format_number(value)


def format_duration(seconds: float) -> str:
    """8000 as "2 h 13 min"; empty if not finite."""
    if not math.isfinite(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def format_clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_names(names: Sequence[str], shown: int) -> str:
    """The first few names, and how many there are more."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def format_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows as lines with aligned columns. `right` has the indices of the columns that are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
