"""Amounts as people write them: 10GB, 10BT, 500M."""

import re

from .errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_count(text: str, name: str) -> int:
    """ "10BT", "500M", "2.5e9" or "1_000_000" as a number of tokens.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([KMBGT]?)T?", text.strip(), re.IGNORECASE)
    # "10T" is ten tokens to nobody: a trailing T stands for tokens only behind another letter.
    value = float(re.sub("[_,]", "", found[1])) * _UNITS[found[2].upper()] if found else 0
    if not found or value != int(value):
        raise UserError(f"{name} {text!r} is not a number of tokens; expected such as 10BT, 500M or 1000000")
    return int(value)


def parse_target(text: str) -> tuple[str, float]:
    """ "10GB" as bytes of text, "10BT" as tokens.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([KMGTB]?)(B|T)", text.strip(), re.IGNORECASE)
    if not found or (found[2].upper() == "B" and found[3].upper() == "B"):
        raise UserError(f"--target {text!r}: expected bytes of text such as 10GB, or tokens such as 10BT")
    value = float(re.sub("[_,]", "", found[1])) * _UNITS[found[2].upper()]
    if value <= 0:
        raise UserError(f"--target {text!r} is nothing; expected such as 10GB or 10BT")
    return ("bytes" if found[3].upper() == "B" else "tokens"), value


def scaled(value: float) -> str:
    """Three digits and K, M, G or T."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "
