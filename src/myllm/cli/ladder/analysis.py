"""From losses to the figures of ladder.json: multipliers by three ways, each with its band, and the held-out rung.

A rung is a size with a length. The largest is never fitted: the laws predict it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .fit import MIN_LENGTHS, Losses, bands, fit_joint, fit_sizes, hold_out, size_multipliers, tokens_to_reach

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


def match_losses(losses: Losses, seconds: np.ndarray, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """For each run of the first recipe of a pair: the tokens and the time in which the second reaches its loss.

    No law is needed.
    """
    recipes, sizes, lengths = losses.recipes, losses.parameters, losses.tokens

    def tokens_needed(means: np.ndarray) -> np.ndarray:  # (R, S, K) -> (pairs, S, K)
        shape = len(pairs), len(sizes), len(lengths)
        needed = np.empty(shape)
        for pair, size, length in np.ndindex(shape):
            first, second = pairs[pair]
            needed[pair, size, length] = tokens_to_reach(means[first, size, length], lengths, means[second, size])
        return needed

    def figures(means: np.ndarray) -> dict[str, np.ndarray]:
        # Beyond the shortest and the longest run, only a bound is known.
        return {"token_ratio": lengths / np.clip(tokens_needed(means), *lengths[[0, -1]])}

    needed, ratios = tokens_needed(losses.means), bands(losses, figures, drop_sizes=False)["token_ratio"]
    per_token = np.nanmean(seconds / lengths[:, None], axis=(2, 3))  # (R, S, K, J) / (K, 1) -> (R, S)
    rows = []
    for pair, size, length in np.ndindex(needed.shape):
        first, second = pairs[pair]
        tokens, ratio = needed.item(pair, size, length), ratios.item(pair, size, length)
        slower = float(per_token[second, size] / per_token[first, size])
        rows.append({
            "first": recipes[first], "second": recipes[second],
            "parameters": float(sizes[size]), "tokens": float(lengths[length]),
            "loss": float(losses.means[first, size, length]), "tokens_needed": tokens,
            "bound": "at least" if tokens == 0 else "at most" if math.isinf(tokens) else None,
            "token_ratio": ratio, "time_ratio": {end: value / slower for end, value in ratio.items()},
        })  # fmt: skip
    return rows


def analyze_sizes(losses: Losses, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The law of the reference at each size, and multipliers by it."""
    lengths = int(np.isfinite(hold_out(losses.means)[0]).sum(axis=-1).max())
    if lengths < MIN_LENGTHS:
        held_out = " (the largest rung is held out)" if lengths < len(losses.tokens) else ""
        return {"missing": f"a law of the loss over tokens needs 3 lengths, there are {lengths}{held_out}"}

    def figures(means: np.ndarray) -> dict[str, np.ndarray]:
        fitted = hold_out(means)
        laws = fit_sizes(fitted, losses.tokens)
        multipliers = size_multipliers(laws, fitted, losses.tokens)  # (R, S)
        predicted = laws.losses(multipliers[:, :, None] * losses.tokens)  # (R, S, K)
        return {"multipliers": _by_pair(multipliers, pairs), **_largest_rung(predicted, means)}

    found = bands(losses, figures)
    laws = fit_sizes(hold_out(losses.means), losses.tokens)
    return {
        "b": laws.exponent, "E": laws.irreducible.tolist(), "A": laws.amplitude.tolist(),
        "equal_tokens": laws.equal_tokens(losses.means).tolist(),
        "multipliers": found["multipliers"].tolist(),
        "held_out": _held_out(losses, found),
    }  # fmt: skip


def analyze_joint(losses: Losses, pairs: Sequence[Pair], target: Target) -> dict[str, Any]:
    """The law of all recipes and sizes: multipliers, whether they change with size, and their extrapolation."""
    _, sizes, lengths, _ = losses.values.shape
    if min(sizes, lengths) < MIN_JOINT:
        return {"missing": f"the joint law needs 3 sizes and 3 lengths, there are {sizes} and {lengths}"}
    full = fit_joint(hold_out(losses.means), losses.parameters, losses.tokens)

    def figures(means: np.ndarray) -> dict[str, np.ndarray]:
        law = fit_joint(hold_out(means), losses.parameters, losses.tokens, start=full)
        return {
            "multipliers": _by_pair(law.multipliers(losses.parameters), pairs),
            "extrapolated": _by_pair(law.multipliers(target.parameters), pairs),
            "g": np.array([law.size_exponents[second] - law.size_exponents[first] for first, second in pairs]),
            **_largest_rung(law.losses(losses.parameters, losses.tokens), means),
        }

    found = bands(losses, figures)
    # For plots: between the lengths and a little beyond them.
    plotted = np.geomspace(losses.tokens[0] / 1.2, losses.tokens[-1] * 1.2, 40)
    return {
        "constants": full.constants,
        "multipliers": found["multipliers"].tolist(),
        "g": found["g"].tolist(),
        "held_out": _held_out(losses, found),
        "extrapolation": {
            "to": target.name, "parameters": target.parameters, "tokens": target.tokens,
            "parameters_factor": target.parameters / float(losses.parameters[-1]),
            "tokens_factor": target.tokens / float(losses.tokens[-1]),
            "multipliers": found["extrapolated"].tolist(),
            "published": PUBLISHED,
        },
        "curves": {"tokens": plotted.tolist(), "losses": full.losses(losses.parameters, plotted).tolist()},
    }  # fmt: skip


def _by_pair(multipliers: np.ndarray, pairs: Sequence[Pair]) -> np.ndarray:
    """Multiplier of the second recipe of each pair against the first: (R, ...) -> (pairs, ...)."""
    return np.stack([multipliers[second] / multipliers[first] for first, second in pairs])


def _largest_rung(predicted: np.ndarray, means: np.ndarray) -> dict[str, np.ndarray]:
    """What a law says of the rung that it was not fitted to, and its errors there: (R, S, K) -> (R,)."""
    return {"predicted": predicted[:, -1, -1], "errors": predicted[:, -1, -1] - means[:, -1, -1]}


def _held_out(losses: Losses, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The largest rung of each recipe: its loss, what a law says of it, and the difference."""
    rungs = zip(losses.recipes, losses.means[:, -1, -1], found["predicted"], found["errors"], strict=True)
    return [
        {
            "recipe": recipe, "loss": float(loss), "predicted": predicted, "error": error,
            "inside": error["low"] <= 0 <= error["high"],
        }
        for recipe, loss, predicted, error in rungs
    ]  # fmt: skip
