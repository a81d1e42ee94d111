"""A parabola in each setting, fitted to all finished runs together, and what it says in words."""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .search import TunedRun, ranked
from .space import Parameter

BEST_FRACTION = 0.6
"""Of the runs of a rung and a seed, these enter the fit: a parabola describes the loss near its optimum only."""
EDGE = 0.05
"""An optimum within this fraction of the range from one of its ends is at the edge."""


@dataclass(frozen=True)
class Parabola:
    """The loss around its optimum in one setting, with the other settings at their optimum."""

    optimum: float | None
    """A value of the setting; None if there is none in the range."""
    low: float
    high: float
    """The 1-sigma range of the optimum, as values."""
    curvature: float
    """Half the second derivative, in nats per squared unit of the coordinate."""
    center: float
    """The coordinate of the optimum, wherever it is."""
    sigma: float
    """Standard deviation of the runs around the fit, in nats: noise, and what the parabola does not describe."""
    verdict: str
    """In words."""


def fit_parabolas(runs: list[TunedRun], parameters: list[Parameter]) -> dict[str, Parabola]:
    """Fit loss = level of the rung and seed + sum over settings of (a x^2 + b x), by least squares.

    The settings are fitted together, so that the spread of one does not count as the noise of another. All rungs enter,
    since values mean those of a run of D tokens on each.

    Returns:
        by name; empty if there are too few runs that have not diverged.
    """
    groups: dict[tuple[int, int], list[TunedRun]] = defaultdict(list)
    for run in ranked(runs):
        if math.isfinite(run.loss):
            groups[run.group].append(run)
    n_coefficients = 2 * len(parameters)
    used = [run for group in groups.values() for run in group[: max(math.ceil(BEST_FRACTION * len(group)), 3)]]
    if len(used) < n_coefficients + len(groups) + 1:
        return {}
    points = np.array([[p.coordinate(run.values[p.name]) for p in parameters] for run in used])
    level = np.array([[float(run.group == group) for group in groups] for run in used])
    middle = np.array([sum(p.bounds) / 2 for p in parameters])  # keeps x and x^2 apart, numerically
    x = points - middle
    design = np.hstack([x**2, x, level])
    loss = np.array([run.loss for run in used])
    coefficients, _, rank, _ = np.linalg.lstsq(design, loss, rcond=None)
    if rank < design.shape[1]:
        return {}
    residual = loss - design @ coefficients
    variance = float(residual @ residual) / (len(used) - design.shape[1])
    covariance = variance * np.linalg.inv(design.T @ design)
    n = len(parameters)
    return {
        p.name: _parabola(p, coefficients[[i, n + i]], covariance[np.ix_([i, n + i], [i, n + i])], math.sqrt(variance))
        for i, p in enumerate(parameters)
    }


def _parabola(parameter: Parameter, coefficients: np.ndarray, covariance: np.ndarray, sigma: float) -> Parabola:
    """The parabola a x^2 + b x of one setting, where x is 0 in the middle of the range.

    Shapes: coefficients (2,) are a and b, covariance (2, 2)
    """
    a, b = map(float, coefficients)
    first, last = parameter.bounds
    middle, half = (first + last) / 2, (last - first) / 2
    lowest_at = -b / (2 * a) if a > 0 else math.inf
    ends = [a * x**2 + b * x for x in (-half, half)]
    lowest = a * lowest_at**2 + b * lowest_at if abs(lowest_at) <= half else min(ends)
    rise = max(ends) - lowest
    verdict = ""
    if rise < 2 * sigma:
        verdict = (
            f"flat: over the whole range the loss changes by {rise:.3f} nats, and single runs scatter by {sigma:.3f}"
        )
    elif abs(lowest_at) > half * (1 - 2 * EDGE):
        end = parameter.value_at(first if ends[0] < ends[1] else last)
        verdict = f"at the edge of the range: the loss still falls towards {end:.3g}; search beyond it"
    if verdict:
        return Parabola(None, parameter.low, parameter.high, a, math.nan, sigma, verdict)
    center = middle + lowest_at
    # The delta method: the derivatives of -b / 2a by a and b.
    gradient = np.array([b / (2 * a * a), -1 / (2 * a)])
    deviation = math.sqrt(gradient @ covariance @ gradient)
    low, high = sorted(parameter.value_at(center + side * deviation) for side in (-1, 1))
    optimum = parameter.value_at(center)
    verdict = f"optimum {optimum:.3g}, 1-sigma range {low:.3g} to {high:.3g}"
    return Parabola(optimum, low, high, a, center, sigma, verdict)
