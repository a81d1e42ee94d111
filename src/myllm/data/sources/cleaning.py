"""Changes to the text itself. All off unless asked for; each is counted in the manifest."""

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache

from myllm.config import DataConfig

# Controls but tab, newline and carriage return; formats such as zero-width marks stay, since scripts need some.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

_MOST_MARKS = 100
"""More combining marks on one letter are no writing: bringing n of them into order takes n x n steps."""


def clean(text: str, config: DataConfig, report: Callable[[str], None]) -> str | None:
    """A document as the settings want it, or None where they drop it. `report` is told what was done, or noticed."""
    if not text or text.isspace():
        report("empty")
        return None
    if config.strip_control and _CONTROL.search(text):
        text = _CONTROL.sub("", text)
        report("control_characters_stripped")
        if not text or text.isspace():
            report("empty")
            return None
    # Behind the above: a mark may have stood apart from its letter by a control character.
    if config.normalize_unicode and not text.isascii():
        if _many_marks().search(text):
            report("unicode_not_normalized")
        elif not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            report("unicode_normalized")
    if "<|endoftext|>" in text:  # stays, and becomes ordinary tokens
        report("end_of_text_spelled_out")
    if "\0" in text:
        report("nul_characters_kept")
    if config.min_chars and len(text) < config.min_chars:
        report("too_short")
        return None
    return text


@cache
def _many_marks() -> re.Pattern[str]:
    """A run of characters that combine with those before them, or that are written out as such."""
    characters = map(chr, range(0x300, sys.maxunicode + 1))
    marks = [c for c in characters if unicodedata.combining(unicodedata.normalize("NFD", c)[0])]
    return re.compile(f"[{''.join(marks)}]{{{_MOST_MARKS + 1}}}")
