"""From losses to the figures of ladder.json: multipliers by three ways, each with its band, and the held-out rung.

A rung is a size with a length. The largest is never fitted: the laws predict it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from .fit import Band, JointLaw, Losses, bands, fit_joint, fit_sizes, hold_out, size_multipliers, tokens_to_reach

PUBLISHED = (1.2, 1.3)
"""Multiplier of Muon against an equally tuned AdamW at 300M parameters and 6 to 48B tokens: their final losses 3.263
3.166 3.094 3.042 and 3.224 3.143 3.079 3.029, through a law fitted to the first. Source: marin-community/marin,
experiments/optimizer_sweep/Analysis."""
MIN_JOINT = 3
"""Sizes and lengths that the joint law needs."""
Pair = tuple[int, int]
"""Indices of two recipes; the multiplier is that of the second against the first."""


@dataclass(frozen=True)
class Target:
    """A size and a length far beyond the ladder, to which the joint law is extrapolated."""

    name: str
    parameters: float
    tokens: float


def analyze(losses: Losses, seconds: np.ndarray, target: Target) -> dict[str, Any]:
    """All figures, as JSON values. Shapes: seconds of training (R, S, K, J)."""
    pairs = list(combinations(range(len(losses.recipes)), 2))
    return {
        "pairs": [[losses.recipes[first], losses.recipes[second]] for first, second in pairs],
        "parameters": losses.parameters.tolist(),
        "tokens": losses.tokens.tolist(),
        "mean_losses": losses.means.tolist(),
        "matches": match_losses(losses, seconds, pairs),
        "per_size": analyze_sizes(losses, pairs),
        "joint": analyze_joint(losses, pairs, target),
    }


# -- without a law ----------------------------------------------------------------------------------------------------


class _Match(NamedTuple):
    """A run of the recipe `first`, whose loss the recipe `second` is to reach at the same size. All are indices."""

    first: int
    second: int
    size: int
    length: int

    def tokens_needed(self, means: np.ndarray, tokens: np.ndarray) -> float:
        loss = float(means[self.first, self.size, self.length])
        return tokens_to_reach(loss, tokens, means[self.second, self.size])


def match_losses(losses: Losses, seconds: np.ndarray, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """For each run of the first recipe of a pair: the tokens and the time in which the second reaches its loss."""
    sizes, lengths = range(len(losses.parameters)), range(len(losses.tokens))
    matches = [_Match(*pair, size, length) for pair in pairs for size in sizes for length in lengths]

    def figures(means: np.ndarray) -> dict[str, np.ndarray]:
        needed = [match.tokens_needed(means, losses.tokens) for match in matches]
        # Beyond the shortest and the longest run, only a bound is known.
        known = np.clip(needed, *losses.tokens[[0, -1]])
        return {"token_ratio": losses.tokens[[match.length for match in matches]] / known}  # (matches,)

    ratios = bands(losses, figures, drop_sizes=False)["token_ratio"]
    per_token = np.nanmean(seconds / losses.tokens[:, None], axis=(2, 3))  # (R, S, K, J) / (K, 1) -> (R, S)
    rows = []
    for match, ratio in zip(matches, ratios, strict=True):
        first, second, size, length = match
        tokens = match.tokens_needed(losses.means, losses.tokens)
        slower = float(per_token[second, size] / per_token[first, size])
        rows.append({
            "first": losses.recipes[first], "second": losses.recipes[second],
            "parameters": float(losses.parameters[size]), "tokens": float(losses.tokens[length]),
            "loss": float(losses.means[first, size, length]), "tokens_needed": tokens,
            "bound": "at least" if tokens == 0 else "at most" if math.isinf(tokens) else None,
            "token_ratio": asdict(ratio),
            "time_ratio": asdict(Band(ratio.value / slower, ratio.low / slower, ratio.high / slower)),
        })  # fmt: skip
    return rows


# -- laws -------------------------------------------------------------------------------------------------------------


def analyze_sizes(losses: Losses, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The law of the reference at each size, and multipliers by it."""
    if len(losses.tokens) < 3:
        return {"missing": f"a law of the loss over tokens needs 3 lengths, there are {len(losses.tokens)}"}

    def figures(means: np.ndarray) -> dict[str, np.ndarray]:
        fitted = hold_out(means)
        laws = fit_sizes(fitted, losses.tokens)
        multipliers = size_multipliers(laws, fitted)  # (R, S)
        predicted = laws.losses(multipliers)[:, -1, -1]  # (R, S, K) -> (R,)
        errors = predicted - means[:, -1, -1]
        return {"multipliers": _by_pair(multipliers, pairs), "predicted": predicted, "errors": errors}

    found = bands(losses, figures)
    laws = fit_sizes(hold_out(losses.means), losses.tokens)
    return {
        "b": laws.exponent, "E": laws.irreducible.tolist(), "A": laws.amplitudes().tolist(),
        "equal_tokens": laws.equal_tokens(losses.means).tolist(),
        "multipliers": _json(found["multipliers"]),
        "held_out": _held_out(losses, found),
    }  # fmt: skip


def analyze_joint(losses: Losses, pairs: Sequence[Pair], target: Target) -> dict[str, Any]:
    """The law of all recipes and sizes: multipliers, whether they change with size, and their extrapolation."""
    _, sizes, lengths, _ = losses.values.shape
    if min(sizes, lengths) < MIN_JOINT:
        return {"missing": f"the joint law needs 3 sizes and 3 lengths, there are {sizes} and {lengths}"}
    full = fit_joint(hold_out(losses.means), losses.parameters, losses.tokens)
    largest, longest = float(losses.parameters[-1]), float(losses.tokens[-1])

    def figures(means: np.ndarray) -> dict[str, np.ndarray]:
        law = fit_joint(hold_out(means), losses.parameters, losses.tokens, start=full)
        multipliers = np.stack([law.multipliers(size) for size in losses.parameters], axis=1)  # (R, S)
        predicted = np.array([law.loss(recipe, largest, longest) for recipe in range(len(means))])  # (R,)
        return {
            "multipliers": _by_pair(multipliers, pairs),
            "extrapolated": _by_pair(law.multipliers(target.parameters), pairs),
            "g": np.array([law.size_exponents[second] - law.size_exponents[first] for first, second in pairs]),
            "predicted": predicted,
            "errors": predicted - means[:, -1, -1],
        }

    found = bands(losses, figures)
    return {
        "constants": full.constants,
        "multipliers": _json(found["multipliers"]),
        "g": _json(found["g"]),
        "held_out": _held_out(losses, found),
        "extrapolation": {
            "to": target.name, "parameters": target.parameters, "tokens": target.tokens,
            "parameters_factor": target.parameters / largest, "tokens_factor": target.tokens / longest,
            "multipliers": _json(found["extrapolated"]),
            "published": PUBLISHED,
        },
        "curves": _curves(full, losses),
    }  # fmt: skip


def _by_pair(multipliers: np.ndarray, pairs: Sequence[Pair]) -> np.ndarray:
    """Multiplier of the second recipe of each pair against the first: (R, ...) -> (pairs, ...)."""
    return np.stack([multipliers[second] / multipliers[first] for first, second in pairs])


def _held_out(losses: Losses, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The largest rung of each recipe: its loss, what a law says of it, and the difference."""
    rungs = zip(losses.recipes, losses.means[:, -1, -1], found["predicted"], found["errors"], strict=True)
    return [
        {
            "recipe": recipe, "loss": float(loss), "predicted": asdict(predicted), "error": asdict(error),
            "inside": bool(error.low <= 0 <= error.high),
        }
        for recipe, loss, predicted, error in rungs
    ]  # fmt: skip


def _json(found: np.ndarray) -> Any:
    """Bands as JSON values, in lists as deep as the array."""
    return np.vectorize(asdict, otypes=[object])(found).tolist()


def _curves(law: JointLaw, losses: Losses) -> dict[str, Any]:
    """The law between and a little beyond the lengths, for plots: losses of (R, S, points)."""
    tokens = np.geomspace(losses.tokens[0] / 1.2, losses.tokens[-1] * 1.2, 40)
    values = [
        [[law.loss(recipe, size, length) for length in tokens] for size in losses.parameters]
        for recipe in range(len(losses.recipes))
    ]
    return {"tokens": tokens.tolist(), "losses": values}
