"""Cleaning makes the requested changes, counts them, and changes nothing else."""

import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.config import DataConfig
from myllm.data.sources.cleaning import clean

# Letters that compose, marks, controls of both ranges, white space, format characters and a lone surrogate.
LETTERS = "aé가ﬁe\u0301\u0316\u0344\u0f73\u1100\u1161\x00\x07\x7f\x85\x9f \t\n\r\u2028\u200b\ufeff\ud83d"


def cleaned(text: str, **settings: object) -> tuple[str | None, dict[str, int]]:
    counts: Counter[str] = Counter()
    return clean(text, DataConfig(**settings), lambda reason: counts.update([reason])), dict(counts)


@given(st.text(alphabet=LETTERS))
def test_text_unchanged_by_default(text: str) -> None:
    kept, counts = cleaned(text)
    noticed = {"nul_characters_kept": 1} if "\0" in text else {}
    assert (kept, counts) == ((text, noticed) if text.strip() else (None, {"empty": 1}))


@pytest.mark.parametrize("text", ["", " ", "\n\t\r\x0b\u2003", " " * 1_000_000])
def test_whitespace_only_text_is_empty(text: str) -> None:
    assert cleaned(text) == (None, {"empty": 1})


def test_unicode_normalized_and_counted() -> None:
    assert cleaned("cafe\u0301", normalize_unicode=True) == ("café", {"unicode_normalized": 1})
    assert cleaned("café ﬁ", normalize_unicode=True) == ("café ﬁ", {})  # NFC, not NFKC
    assert cleaned("\u1112\u1161\u11ab", normalize_unicode=True) == ("한", {"unicode_normalized": 1})
    assert cleaned("a\ud83d", normalize_unicode=True) == ("a\ud83d", {})


def test_control_characters_stripped_except_whitespace() -> None:
    text = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])) + "a\u200b\u200d\ufeff"
    assert cleaned(text, strip_control=True) == ("\t\n\ra\u200b\u200d\ufeff", {"control_characters_stripped": 1})
    assert cleaned("a\t\r\n", strip_control=True) == ("a\t\r\n", {})
    assert cleaned("\x00 \x07", strip_control=True) == (None, {"control_characters_stripped": 1, "empty": 1})


def test_short_texts_dropped_and_counted() -> None:
    assert cleaned("abc", min_chars=3) == ("abc", {})
    assert cleaned("ab", min_chars=3) == (None, {"too_short": 1})
    assert cleaned("🙂🙂🙂", min_chars=3) == ("🙂🙂🙂", {})
    # What counts is the length of what is kept.
    assert cleaned("ab\x00", min_chars=3, strip_control=True)[0] is None
    assert cleaned("ae\u0301", min_chars=3, normalize_unicode=True)[0] is None


@given(st.text(alphabet=LETTERS))
def test_cleaning_is_idempotent(text: str) -> None:
    """Also if a control character separates a letter from its combining mark."""
    settings = {"normalize_unicode": True, "strip_control": True}
    kept, _ = cleaned(text, **settings)
    if kept is not None:
        assert unicodedata.is_normalized("NFC", kept)
        assert cleaned(kept, **settings) == (kept, {})
        without = "".join(c for c in text if unicodedata.category(c) != "Cc" or c in "\t\n\r")
        assert kept == unicodedata.normalize("NFC", without)


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73", "\u0344\u0316"])
def test_combining_marks_take_linear_time(marks: str) -> None:
    """Python needs n x n steps to sort n marks, hours for a million. No script uses a hundred."""
    text = "e\u0301 a" + marks * (1_000_000 // len(marks))
    assert cleaned(text, normalize_unicode=True) == (text, {"unicode_not_normalized": 1})
    assert cleaned("a" + "\u0301\u0316" * 15, normalize_unicode=True)[1] == {"unicode_normalized": 1}
