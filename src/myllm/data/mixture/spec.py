"""How a mixture is written: names of sources or data sets with weights.

A:0.7 B:0.3                             weights by tokens, which are weights by sequences
A:0.7 B:0.3 @18000 A:0.2 C:0.8          other weights from step 18,000 on
[["my texts", 0.7], ["B", "3/10"]]      the same as JSON, for names with spaces
"""

import json
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from myllm.config import DataConfig
from myllm.errors import UserError

MAX_DENOMINATOR = 1_000_000
_ENTRY = re.compile(r"(.+):(\d*\.?\d+|\d+/\d+)")
_STAGE = re.compile(r"@(\d+)")
Entry = tuple[str, Fraction]


@dataclass(frozen=True)
class Stage:
    """The weights from one step on."""

    step: int
    weights: tuple[Fraction, ...]
    """By component; their sum is 1."""


@dataclass(frozen=True)
class Mixture:
    """Names of sources or data sets, and their weights."""

    names: tuple[str, ...]
    stages: tuple[Stage, ...]

    def format(self, names: tuple[str, ...] | None = None) -> str:
        """The text that gives this mixture, for example with other names of its components."""
        names = names or self.names
        stages = [
            (stage.step, [(name, weight) for name, weight in zip(names, stage.weights, strict=True) if weight])
            for stage in self.stages
        ]
        as_json = any(re.search(r"\s", name) or name[0] in "@[" for name in names)
        words: list[Any] = []
        for step, entries in stages:
            if step:
                words.append(step if as_json else f"@{step}")
            pairs = [(name, _decimal(weight)) for name, weight in entries]
            words += pairs if as_json else [f"{name}:{weight}" for name, weight in pairs]
        return json.dumps(words) if as_json else " ".join(words)


def parse_mixture(text: str) -> Mixture | None:
    """The mixture that a text describes; None for the name of a single source or data set.

    Raises:
        UserError: an entry without a weight, weights that do not add up, stages out of order.
    """
    words = text.split()
    if text.lstrip().startswith("["):
        stages = _read_json(text)
    elif len(words) > 1 and any(_ENTRY.fullmatch(word) for word in words):
        stages = _read_words(text, words)
    else:
        return None
    names = tuple(dict.fromkeys(name for _, entries in stages for name, _ in entries))
    for _, entries in stages:
        _check_weights(text, entries)
    if any(after <= before for (before, _), (after, _) in pairwise(stages)):
        raise UserError(f"the steps of the mixture {text!r} must grow, and be above 0")
    return Mixture(
        names,
        tuple(Stage(step, tuple(dict(entries).get(name, Fraction(0)) for name in names)) for step, entries in stages),
    )


def _read_words(text: str, words: list[str]) -> list[tuple[int, list[Entry]]]:
    stages: list[tuple[int, list[Entry]]] = [(0, [])]
    for word in words:
        if stage := _STAGE.fullmatch(word):
            stages.append((int(stage[1]), []))
        elif entry := _ENTRY.fullmatch(word):
            stages[-1][1].append((entry[1], _weight(text, entry[1], entry[2])))
        else:
            raise UserError(
                f"{word!r} in the mixture {text!r} has no weight; expected NAME:WEIGHT, such as {word}:0.3 (names with "
                'spaces: a JSON list, [["NAME", 0.3], ...])'
            )
    return stages


def _read_json(text: str) -> list[tuple[int, list[Entry]]]:
    try:
        values = json.loads(text, parse_float=str)
    except ValueError as error:
        raise UserError(f"the mixture {text!r} is not valid JSON: {error}") from None
    stages: list[tuple[int, list[Entry]]] = [(0, [])]
    for value in values:
        match value:
            case int() if value is not True and value is not False:
                stages.append((value, []))
            case [str(name), int() | str() as weight]:
                stages[-1][1].append((name, _weight(text, name, str(weight))))
            case _:
                raise UserError(
                    f'{json.dumps(value)} in the mixture {text!r} is not an entry; expected ["NAME", WEIGHT], or the '
                    "step from which the entries after it hold"
                )
    return stages


def _weight(text: str, name: str, weight: str) -> Fraction:
    try:
        found = Fraction(weight)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"the weight {weight!r} of {name} in the mixture {text!r} is not a number") from None
    if not 0 < found <= 1:
        raise UserError(f"the weight {weight} of {name} in the mixture {text!r} must be above 0 and at most 1")
    return found


def _check_weights(text: str, entries: list[Entry]) -> None:
    if not entries:
        raise UserError(f"the mixture {text!r} needs entries NAME:WEIGHT at its start and after each @STEP")
    total = sum((weight for _, weight in entries), Fraction(0))
    if total != 1:
        summands = " + ".join(str(_decimal(weight)) for _, weight in entries)
        raise UserError(
            f"the weights of the mixture {text!r} must add up to 1, but {summands} = {_decimal(total)} "
            "(fractions work too: 1/3)"
        )
    if len({name for name, _ in entries}) < len(entries):
        raise UserError(f"the mixture {text!r} names a component twice")
    if math.lcm(*(weight.denominator for _, weight in entries)) > MAX_DENOMINATOR:
        raise UserError(f"the weights of the mixture {text!r} need too many digits; use at most six decimals")


def _decimal(weight: Fraction) -> float | str:
    """0.7, or 1/3 where no decimal number is exact."""
    return float(weight) if Fraction(repr(float(weight))) == weight else str(weight)


def find_mixture(config: DataConfig) -> Mixture | None:
    """The mixture that the config's data set or source describes; None: a single one.

    Raises:
        UserError: as `parse_mixture`.
    """
    return parse_mixture(config.source if config.dataset is None else config.dataset)


def component_configs(config: DataConfig, mixture: Mixture) -> list[DataConfig]:
    """The settings that prepare, or find, each component."""
    if config.dataset is not None:
        return [replace(config, dataset=name) for name in mixture.names]
    return [replace(config, source=name, fallback=None) for name in mixture.names]
