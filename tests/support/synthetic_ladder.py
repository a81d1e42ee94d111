"""Losses of a made-up ladder that follow a known law."""

import numpy as np

from myllm.cli.ladder.analysis import Target
from myllm.cli.ladder.fit import Losses

SIZES, LENGTHS = np.array([0.35e6, 0.52e6, 1.0e6]), np.array([0.8e6, 1.6e6, 3.3e6])
LAW = {"E": 1.7, "A": 60.0, "a": 0.32, "B": 200.0, "b": 0.38}
SAVED, SLOPES = (1.0, 1.28, 1.6), (0.0, -0.05, 0.03)  # m at the middle size, and g
MIDDLE = np.exp(np.log(SIZES).mean())
TARGET = Target("lf-llm-269m", 3.2e8, 1e10)


def law(recipe: int, size: float, tokens: float) -> float:
    equal = SAVED[recipe] * (size / MIDDLE) ** SLOPES[recipe] * tokens
    return LAW["E"] + LAW["A"] * size ** -LAW["a"] + LAW["B"] * equal ** -LAW["b"]


def exact() -> np.ndarray:
    return np.array([[[law(recipe, size, tokens) for tokens in LENGTHS] for size in SIZES] for recipe in range(3)])


def ladder(noise: float, seeds: int = 2, seed: int = 0) -> Losses:
    """With noise that the recipes share (the seed's), four times what they do not share."""
    chance = np.random.default_rng(seed)
    shared = 4 * noise * chance.standard_normal((1, 3, 3, seeds))
    values = exact()[..., None] + shared + noise * chance.standard_normal((3, 3, 3, seeds))
    return Losses(("reference", "adamw", "modern"), SIZES, LENGTHS, values)
