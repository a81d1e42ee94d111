"""Learning rates of a recipe by width and length: tuned at one or two widths and one length, carried over by rule."""

import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from myllm.config import OptimConfig
from myllm.errors import UserError
from myllm.files import json_safe, read_json, write_json
from myllm.migrations import LADDER_RATES
from myllm.planning.transfer import transfer

SETTINGS = ("max_lr", "muon_lr", "weight_decay")
"""Settings of `OptimConfig` that a ladder tunes or takes from a file."""
STEEPEST = -1.0
"""Exponent of the width, at the lowest: that of AdamW's hidden matrices in the muP limit (Yang et al. 2022, arXiv
2203.03466). The highest is 0: no source has rates that rise with the width, noise has."""


@dataclass(frozen=True)
class RecipeRates:
    """Optimizer settings of one recipe, as measured at some widths and one length."""

    tokens: int
    """Length at which they were measured."""
    by_width: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Values of SETTINGS. Empty: the recipe's own at every width."""

    def at(self, optim: OptimConfig, width: int, tokens: int) -> OptimConfig:
        """The recipe's settings with the rates for one cell.

        Between two measured widths, rates are interpolated in log-log; outside, extrapolated with an exponent from
        STEEPEST to 0. `planning.transfer` carries them over to other lengths.
        """
        if self.by_width:
            nearest = self.by_width[min(self.by_width, key=lambda known: abs(math.log(known / width)))]
            values: dict[str, Any] = dict(nearest) | {
                name: _at_width({known: row[name] for known, row in self.by_width.items()}, width)
                for name in ("max_lr", "muon_lr")
                if all(name in row for row in self.by_width.values())
            }
            optim = replace(optim, **values)
        return optim if tokens == self.tokens else transfer(optim, tokens / self.tokens)


def _at_width(rates: Mapping[int, float], width: int) -> float:
    """A rate at one width, from those at other widths."""
    if width in rates or len(rates) == 1:
        return rates.get(width) or next(iter(rates.values()))
    widths = sorted(rates)
    last = min(max(bisect(widths, width), 1), len(widths) - 1)
    start, end = widths[last - 1], widths[last]
    exponent = math.log(rates[end] / rates[start]) / math.log(end / start)
    if not start < width < end:
        exponent = min(max(exponent, STEEPEST), 0.0)
    nearest = end if width > end else start
    return rates[nearest] * (width / nearest) ** exponent


def read_rates(path: Path, recipes: list[str]) -> dict[str, RecipeRates]:
    """Read a rates file: {"tokens": 1600000, "recipes": {NAME: {WIDTH: {"max_lr": 0.008, ...}}}}.

    Raises:
        UserError: not such a file, or a recipe is missing.
    """
    try:
        content = LADDER_RATES.upgrade(read_json(path), path)
    except OSError as error:
        raise UserError(f"cannot read the rates {path}: {error.strerror}") from None
    tokens, found = content.get("tokens"), content.get("recipes")
    if type(tokens) is not int or tokens < 1 or not isinstance(found, dict):
        raise UserError(f'{path} is not a rates file: expected {{"tokens": N, "recipes": {{NAME: ...}}}}')
    if missing := [name for name in recipes if name not in found]:
        raise UserError(f"{path} has no rates of {', '.join(missing)}; it has those of {', '.join(found) or 'none'}")
    return {name: RecipeRates(tokens, _parse_widths(found[name], f"{path}, {name}")) for name in recipes}


def write_rates(path: Path, rates: Mapping[str, RecipeRates], **found: Any) -> None:
    """Write a rates file, with what a search found."""
    (tokens,) = {recipe.tokens for recipe in rates.values()}
    by_width = {name: recipe.by_width for name, recipe in rates.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json_safe(LADDER_RATES.stamp({"tokens": tokens, "recipes": by_width} | found)))


def _parse_widths(values: Any, place: str) -> dict[int, dict[str, float]]:
    """Raises a UserError if the values are not {WIDTH: {SETTING: NUMBER}}."""
    for width, row in values.items() if isinstance(values, dict) else [("", values)]:
        known = isinstance(row, dict) and set(row) <= set(SETTINGS)
        if not (known and str(width).isdecimal() and all(isinstance(n, int | float) and n >= 0 for n in row.values())):
            raise UserError(f"{place}: expected {{WIDTH: {{SETTING: NUMBER}}}} with settings {', '.join(SETTINGS)}")
    return {int(width): {name: float(value) for name, value in row.items()} for width, row in values.items()}
