"""Optional changes to the text of a document. Each is counted in the manifest."""

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache

from myllm.config import DataConfig

# Control characters except tab, newline and carriage return. Format characters stay: some scripts need them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
MAX_COMBINING_MARKS = 100
"""On one letter. No script uses more, and sorting n of them takes n x n steps."""


def clean(text: str, config: DataConfig, count: Callable[[str], None]) -> str | None:
    """The document with the requested changes, or None if it is dropped.

    Args:
        count: called with the name of each change or finding.
    """
    if config.strip_control and _CONTROL.search(text):
        text = _CONTROL.sub("", text)
        count("control_characters_stripped")
    if not text or text.isspace():
        count("empty")
        return None
    # After control characters, which may separate a mark from its letter.
    if config.normalize_unicode and not text.isascii():
        if _many_combining_marks().search(text):
            count("unicode_not_normalized")
        elif not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            count("unicode_normalized")
    if "<|endoftext|>" in text:  # kept, and encoded as ordinary text
        count("end_of_text_spelled_out")
    if "\0" in text:
        count("nul_characters_kept")
    if config.min_chars and len(text) < config.min_chars:
        count("too_short")
        return None
    return text


@cache
def _many_combining_marks() -> re.Pattern[str]:
    characters = map(chr, range(0x300, sys.maxunicode + 1))
    marks = [c for c in characters if unicodedata.combining(unicodedata.normalize("NFD", c)[0])]
    return re.compile(f"[{''.join(marks)}]{{{MAX_COMBINING_MARKS + 1}}}")
