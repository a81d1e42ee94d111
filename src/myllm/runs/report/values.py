"""Format values of configs and of metrics.jsonl for a page."""

from typing import Any

import numpy as np

from myllm.formatting import format_number, format_si
from myllm.runs.history import Row, as_float

MAX_SAMPLE_CHARS = 3_000


def value_text(row: Row, key: str, format_value=format_number) -> str:
    """A row's number as text; empty if it has none."""
    value = row.get(key)
    return format_value(as_float(value)) if isinstance(value, int | float) else ""


def format_loss(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else format_number(value)


def format_perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1_000 else format_si(value)


def as_text(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case list():
            return " | ".join(map(as_text, value))
        case _:
            return str(value)


def shorten_sample(sample: Any) -> str:
    text = str(sample).removeprefix(" ")
    return text if len(text) <= MAX_SAMPLE_CHARS else text[:MAX_SAMPLE_CHARS] + " ..."
