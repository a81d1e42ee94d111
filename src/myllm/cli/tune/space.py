"""The settings that a search varies, their ranges and scales."""

import math
from dataclasses import dataclass, fields, replace

from myllm.config import OptimConfig, RunConfig
from myllm.errors import UserError, did_you_mean

MAX_PARAMETERS = 4
"""More cannot be told apart with some tens of trials."""
DEFAULT_FACTOR = 4.0
"""A default range is the preset's value divided and multiplied by this."""
DECAY_RANGE = 0.01, 0.3
"""Default range of weight_decay for a preset that has none."""
NEAR_ONE = ("beta1", "beta2", "muon_momentum", "muon_momentum_start")
"""Settings of which 1 - value matters: from 0.9 to 0.99 is as far as from 0.99 to 0.999."""


@dataclass(frozen=True)
class Parameter:
    """A number of `optim` that is searched between two values."""

    name: str
    """As in OptimConfig."""
    low: float
    high: float

    @property
    def is_log(self) -> bool:
        return self.low > 0 or self.name in NEAR_ONE

    @property
    def label(self) -> str:
        return f"1 - {self.name}" if self.name in NEAR_ONE else self.name

    def coordinate(self, value: float) -> float:
        """Where a value is on the parameter's scale: log10 of the value or of 1 - value, or the value itself."""
        value = 1 - value if self.name in NEAR_ONE else value
        return math.log10(value) if self.is_log else value

    def value_at(self, coordinate: float) -> float:
        """The inverse of `coordinate`, within the range."""
        value = 10**coordinate if self.is_log else coordinate
        return min(max(1 - value if self.name in NEAR_ONE else value, self.low), self.high)

    @property
    def bounds(self) -> tuple[float, float]:
        """The coordinates of the range, the lower first."""
        first, second = sorted((self.coordinate(self.low), self.coordinate(self.high)))
        return first, second


def parse_search(words: tuple[str, ...]) -> list[Parameter]:
    """Parameters from words such as "optim.max-lr=0.001:0.01".

    Raises:
        UserError: a word is not NAME=LOW:HIGH, or names no number of `optim`.
    """
    parameters = [_parse(word) for word in words]
    names = [parameter.name for parameter in parameters]
    if len(set(names)) < len(names) or len(names) > MAX_PARAMETERS:
        raise UserError(f"--search has {', '.join(names)}; expected 1 to {MAX_PARAMETERS} different settings")
    return parameters


def _parse(word: str) -> Parameter:
    setting, _, bounds = word.partition("=")
    name = setting.removeprefix("optim.").replace("-", "_")
    known = [field.name for field in fields(OptimConfig) if field.type is float or field.type == "float"]
    if not setting.startswith("optim.") or name not in known:
        guess = did_you_mean(name, known)
        raise UserError(f"--search {word}: {setting!r} is no number to search{guess}; known: {', '.join(known)}")
    try:
        low, high = (float(text) for text in bounds.split(":"))
    except ValueError:
        raise UserError(f"--search {word}: expected NAME=LOW:HIGH, such as optim.max-lr=0.001:0.01") from None
    if not (0 <= low < high and math.isfinite(high)) or (name in NEAR_ONE and high >= 1):
        below = " and below 1" if name in NEAR_ONE else ""
        raise UserError(f"--search {word}: expected 0 <= LOW < HIGH{below}")
    return Parameter(name, low, high)


def default_search(optim: OptimConfig) -> list[Parameter]:
    """The two settings that matter most: the rates of both optimizers for Muon, else the rate and the decay.

    With Muon the rate of its AdamW part matters as much as its own (docs/recipe.md).
    """
    names = ["muon_lr", "max_lr"] if optim.optimizer == "muon" else ["max_lr", "weight_decay"]
    return [_around(name, getattr(optim, name)) for name in names]


def _around(name: str, value: float) -> Parameter:
    return Parameter(name, value / DEFAULT_FACTOR, value * DEFAULT_FACTOR) if value else Parameter(name, *DECAY_RANGE)


def own_values(config: RunConfig, parameters: list[Parameter]) -> dict[str, float]:
    """The config's own values of the parameters; one outside its range is moved to the nearer end."""
    return {p.name: min(max(getattr(config.optim, p.name), p.low), p.high) for p in parameters}


def with_values(config: RunConfig, values: dict[str, float]) -> RunConfig:
    return replace(config, optim=replace(config.optim, **values))  # type: ignore[arg-type] # Parameter allows only float settings


def spread_points(count: int, dimensions: int) -> list[list[float]]:
    """Points that fill the unit cube evenly, the same every time: a quasi-random sequence.

    Shapes: (count, dimensions)

    Source: Roberts 2018, "The Unreasonable Effectiveness of Quasirandom Sequences": multiples of the powers of 1 / phi,
    where phi solves phi^(dimensions + 1) = phi + 1.
    """
    phi = 2.0
    for _ in range(40):
        phi = (1 + phi) ** (1 / (dimensions + 1))
    return [[(0.5 + n / phi**d) % 1 for d in range(1, dimensions + 1)] for n in range(1, count + 1)]
