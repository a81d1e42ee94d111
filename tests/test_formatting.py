"""Numbers as text."""

import math

import pytest

from myllm.formatting import format_duration, format_names, format_si


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1_234, "1.23k"), (999_999, "1M"), (7_340_032, "7.34M"), (9.96e9, "9.96B")],
)
def test_format_si(value: float, text: str) -> None:
    assert format_si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(math.nan, ""), (46, "46 s"), (130, "2 min"), (8_000, "2 h 13 min"), (200_000, "2 d 7 h")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_format_names() -> None:
    assert format_names([], 2) == ""
    assert format_names(["a", "b"], 2) == "a, b"
    assert format_names(["a", "b", "c", "d"], 2) == "a, b and 2 more"
