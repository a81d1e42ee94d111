"""From losses to the figures of ladder.json: multipliers by three ways, each with its band, and the held-out rung.

A rung is a size with a length. The largest is never fitted: the laws predict it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .fit import Band, JointLaw, Losses, bands, fit_joint, fit_sizes, hold_out, size_multipliers, tokens_to_reach

PUBLISHED = (1.2, 1.3)
"""Multiplier of Muon against an equally tuned AdamW at 300M parameters and 6 to 48B tokens: their final losses 3.263
3.166 3.094 3.042 and 3.224 3.143 3.079 3.029, through a law fitted to the first. Source: marin-community/marin,
experiments/optimizer_sweep/Analysis."""
MIN_JOINT = 3
"""Sizes and lengths that the joint law needs."""


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


def match_losses(losses: Losses, seconds: np.ndarray, pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """For each run of the first recipe of a pair: the tokens and the time in which the second reaches its loss."""
    sizes, lengths = range(len(losses.parameters)), range(len(losses.tokens))
    per_token = np.nanmean(seconds / losses.tokens[:, None], axis=(2, 3))  # (R, S)
    places = [(pair, size, length) for pair in pairs for size in sizes for length in lengths]

    def ratios(means: np.ndarray) -> np.ndarray:
        return np.array([
            # Beyond the shortest and the longest run, only a bound is known.
            losses.tokens[length]
            / np.clip(_tokens_to_match(means, losses.tokens, pair, size, length), *losses.tokens[[0, -1]])
            for pair, size, length in places
        ])  # fmt: skip

    found = bands(losses, ratios, drop_sizes=False)
    rows = []
    for (pair, size, length), band in zip(places, found, strict=True):
        tokens = _tokens_to_match(losses.means, losses.tokens, pair, size, length)
        first, second = pair
        slower = float(per_token[second, size] / per_token[first, size])
        rows.append({
            "first": losses.recipes[first], "second": losses.recipes[second],
            "parameters": float(losses.parameters[size]), "tokens": float(losses.tokens[length]),
            "loss": float(losses.means[first, size, length]), "tokens_needed": tokens,
            "bound": "at least" if tokens == 0 else "at most" if math.isinf(tokens) else None,
            "token_ratio": asdict(band),
            "time_ratio": asdict(Band(band.value / slower, band.low / slower, band.high / slower)),
        })  # fmt: skip
    return rows


def _tokens_to_match(means: np.ndarray, tokens: np.ndarray, pair: tuple[int, int], size: int, length: int) -> float:
    first, second = pair
    return tokens_to_reach(float(means[first, size, length]), tokens, means[second, size])


# -- laws -------------------------------------------------------------------------------------------------------------


def analyze_sizes(losses: Losses, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The law of the reference at each size, and multipliers by it."""
    if len(losses.tokens) < 3:
        return {"missing": f"a law of the loss over tokens needs 3 lengths, there are {len(losses.tokens)}"}
    sizes = len(losses.parameters)

    def figures(means: np.ndarray) -> np.ndarray:
        fitted = hold_out(means)
        laws = fit_sizes(fitted, losses.tokens)
        saved = size_multipliers(laws, fitted)
        predicted = laws.losses(saved)[:, -1, -1]
        return np.concatenate([_ratios(saved, pairs).ravel(), predicted, predicted - means[:, -1, -1]])

    found = bands(losses, figures)
    laws = fit_sizes(hold_out(losses.means), losses.tokens)
    count = len(pairs) * sizes
    equal = laws.equal_tokens(losses.means)
    return {
        "b": laws.exponent, "E": laws.irreducible.tolist(), "A": laws.amplitudes().tolist(),
        "equal_tokens": equal.tolist(),
        "multipliers": [[asdict(band) for band in found[row * sizes : (row + 1) * sizes]] for row in range(len(pairs))],
        "held_out": _held_out(losses, found[count:]),
    }  # fmt: skip


def analyze_joint(losses: Losses, pairs: Sequence[tuple[int, int]], target: Target) -> dict[str, Any]:
    """The law of all recipes and sizes: multipliers, whether they change with size, and their extrapolation."""
    _, sizes, lengths, _ = losses.values.shape
    if min(sizes, lengths) < MIN_JOINT:
        return {"missing": f"the joint law needs 3 sizes and 3 lengths, there are {sizes} and {lengths}"}
    full = fit_joint(hold_out(losses.means), losses.parameters, losses.tokens)
    rung = float(losses.parameters[-1]), float(losses.tokens[-1])
    places = [*losses.parameters, target.parameters]

    def figures(means: np.ndarray) -> np.ndarray:
        law = fit_joint(hold_out(means), losses.parameters, losses.tokens, start=full)
        saved = np.stack([law.multipliers(place) for place in places], axis=1)  # (R, S + 1)
        predicted = np.array([law.loss(recipe, *rung) for recipe in range(len(means))])
        slopes = np.array([law.size_exponents[second] - law.size_exponents[first] for first, second in pairs])
        return np.concatenate([_ratios(saved, pairs).ravel(), slopes, predicted, predicted - means[:, -1, -1]])

    found, count = bands(losses, figures), len(pairs) * len(places)
    multipliers = [found[row * len(places) : (row + 1) * len(places)] for row in range(len(pairs))]
    return {
        "constants": full.constants,
        "multipliers": [[asdict(band) for band in row[:-1]] for row in multipliers],
        "g": [asdict(band) for band in found[count : count + len(pairs)]],
        "held_out": _held_out(losses, found[count + len(pairs) :]),
        "extrapolation": {
            "to": target.name, "parameters": target.parameters, "tokens": target.tokens,
            "parameters_factor": target.parameters / float(losses.parameters[-1]),
            "tokens_factor": target.tokens / float(losses.tokens[-1]),
            "multipliers": [asdict(row[-1]) for row in multipliers],
            "published": PUBLISHED,
        },
        "curves": _curves(full, losses),
    }  # fmt: skip


def _ratios(saved: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Multiplier of the second recipe of each pair against the first: (R, S) -> (pairs, S)."""
    return np.stack([saved[second] / saved[first] for first, second in pairs])


def _held_out(losses: Losses, found: Sequence[Band]) -> list[dict[str, Any]]:
    """The largest rung of each recipe, from bands of the predictions and then of their errors."""
    recipes = len(losses.recipes)
    return [
        {
            "recipe": name, "loss": float(losses.means[recipe, -1, -1]), "predicted": asdict(found[recipe]),
            "error": asdict(found[recipes + recipe]),
            "inside": bool(found[recipes + recipe].low <= 0 <= found[recipes + recipe].high),
        }
        for recipe, name in enumerate(losses.recipes)
    ]  # fmt: skip


def _curves(law: JointLaw, losses: Losses) -> dict[str, Any]:
    """The law between and a little beyond the lengths, for plots: losses of (R, S, points)."""
    tokens = np.geomspace(losses.tokens[0] / 1.2, losses.tokens[-1] * 1.2, 40)
    values = [
        [[law.loss(recipe, size, length) for length in tokens] for size in losses.parameters]
        for recipe in range(len(losses.recipes))
    ]
    return {"tokens": tokens.tolist(), "losses": values}
