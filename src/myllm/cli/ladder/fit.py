"""What a ladder says about its recipes: laws of the loss, and how many tokens one recipe saves. NumPy only.

Shapes: R recipes (the first is the reference), S sizes, K lengths, J seeds.
A multiplier m is the tokens that the reference needs for a loss, divided by those that the recipe needs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

HUBER = 1e-3
"""Residuals of log L above this count linearly. Source: Hoffmann et al. 2022, arXiv 2203.15556, appendix D.3."""
RESAMPLES = 400
EXPONENTS = (0.05, 1.5)
"""Exponents of N and D are sought in this range; published ones are 0.28 to 0.54."""
MIN_LENGTHS = 3
"""At one size, that a law over tokens needs: any exponent fits two losses."""
LEVEL = (2.5, 97.5)
"""Percentiles of a band."""
Band = dict[str, float]
"""A "value", and from "low" to "high" where it lies in 95 % of resampled seeds, also without any one of the sizes. NaN:
there are neither seeds nor sizes for it."""


@dataclass(frozen=True)
class Losses:
    """The final losses of a ladder."""

    recipes: tuple[str, ...]
    parameters: np.ndarray
    """(S,) float64, N of the reference: matrices and head."""
    tokens: np.ndarray
    """(K,) float64, D."""
    values: np.ndarray
    """(R, S, K, J) float64. NaN: no such run. Infinite: it diverged."""

    @property
    def means(self) -> np.ndarray:
        """Over the seeds there are: (R, S, K). NaN: no seed, or one diverged."""
        means = self._known.mean(axis=-1).filled(np.nan)
        return np.where(np.isfinite(means), means, np.nan)

    @property
    def standard_errors(self) -> np.ndarray:
        """Of each mean, (R, S, K). NaN: fewer than two seeds."""
        return (self._known.std(axis=-1, ddof=1) / np.sqrt(self._seeds)).filled(np.nan)

    def spreads(self) -> np.ndarray:
        """How seeds move the losses of all recipes together, in every cell with two or more seeds: (R, n).

        Widened by sqrt(J / (J - 1)): deviations from the mean of J seeds are too small by that factor.
        """
        paired = np.isfinite(self._deviations).all(axis=0)  # (S, K, J)
        counts = paired.sum(axis=-1, keepdims=True)
        widened = self._deviations * np.sqrt(counts / np.maximum(counts - 1, 1))
        return widened[:, paired & (counts > 1)]

    def resampled(self, spreads: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """The means, moved as other seeds might have: by as many of `spreads` as the cell has seeds. (R, S, K)."""
        seeds = self._seeds.max(axis=0)  # (S, K)
        drawn = spreads[:, chance.integers(spreads.shape[1], size=self.values.shape[1:])]  # (R, S, K, J)
        counted = np.arange(self.values.shape[-1]) < seeds[..., None]
        return self.means + drawn.sum(axis=-1, where=counted) / np.maximum(seeds, 1)

    @property
    def _known(self) -> np.ma.MaskedArray:
        return np.ma.masked_array(self.values, np.isnan(self.values))

    @property
    def _seeds(self) -> np.ndarray:
        return self._known.count(axis=-1)

    @property
    def _deviations(self) -> np.ndarray:
        return self.values - self.means[..., None]


def bands(
    losses: Losses, statistic: Callable[[np.ndarray], Mapping[str, np.ndarray]], drop_sizes: bool = True
) -> dict[str, np.ndarray]:
    """Figures of a ladder with their bands: the same names and shapes, with a `Band` in place of each number.

    Args:
        statistic: from means (R, S, K), where the cells of a size may be NaN, to named figures of any shapes.
        drop_sizes: also leave out one size at a time. False: each figure comes from one size.
    """
    spreads, chance, sizes = losses.spreads(), np.random.default_rng(0), len(losses.parameters)
    resampled = [statistic(losses.resampled(spreads, chance)) for _ in range(RESAMPLES if spreads.size else 0)]
    dropped = [
        statistic(hold_out(losses.means, size, slice(None))) for size in range(sizes if drop_sizes and sizes > 1 else 0)
    ]
    found = {}
    for name, figures in statistic(losses.means).items():
        found[name] = np.empty(figures.shape, dtype=object)
        for place in np.ndindex(figures.shape):
            by_seeds, by_size = ([row[name].item(place) for row in rows] for rows in (resampled, dropped))
            found[name][place] = _band(figures.item(place), by_seeds, by_size)
    return found


def _band(value: float, resampled: Sequence[float], dropped: Sequence[float]) -> Band:
    ends = [end for end in dropped if math.isfinite(end)]
    if np.isfinite(resampled).any():
        ends += list(np.nanpercentile(resampled, LEVEL))
    low, high = (float(min(*ends, value)), float(max(*ends, value))) if ends else (math.nan, math.nan)
    return {"value": value, "low": low, "high": high}


def hold_out(means: np.ndarray, size: int = -1, lengths: int | slice = -1) -> np.ndarray:
    """The means without those of a size: (R, S, K), NaN there. By default the largest rung, which is predicted."""
    kept = means.copy()
    kept[:, size, lengths] = np.nan
    return kept


# -- one size at a time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeLaws:
    """L = E + A D^-b of the reference at each size, with one b for all."""

    irreducible: np.ndarray
    """E, (S,)."""
    amplitude: np.ndarray
    """A, (S,)."""
    exponent: float

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Of the reference after some tokens at each size: (R, S, K) -> (R, S, K)."""
        return self.irreducible[:, None] + self.amplitude[:, None] * tokens**-self.exponent

    def equal_tokens(self, means: np.ndarray) -> np.ndarray:
        """Tokens at which the reference has each loss: (R, S, K) -> (R, S, K). NaN: it never has."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = (means - self.irreducible[:, None]) / self.amplitude[:, None]
            return np.where(ratio > 0, ratio, np.nan) ** (-1 / self.exponent)


def fit_sizes(means: np.ndarray, tokens: np.ndarray) -> SizeLaws:
    """Fit the reference's law at each size; for a given b it is linear, and b is found by a search over a grid.

    Args:
        means: (R, S, K), NaN where unknown. A size with fewer than two lengths has no law (NaN), and none has one if no
            size has MIN_LENGTHS.
    """
    exponents = np.geomspace(*EXPONENTS, 60)
    for _ in range(2):  # around the best of the first search, a finer one
        irreducible, amplitude, errors = _fit_amplitudes(means[0], tokens, exponents)
        best = int(np.argmin(errors))
        found = SizeLaws(irreducible[best], amplitude[best], float(exponents[best]))
        exponents = np.geomspace(exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)], 60)
    return found


def _fit_amplitudes(
    losses: np.ndarray, tokens: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of E and A at each size for each exponent.

    Shapes:
        losses (S, K), exponents (P,) -> (P, S), (P, S), and sums of squares (P,)
    """
    lengths = np.isfinite(losses).sum(axis=-1, keepdims=True)  # (S, 1)
    known = np.isfinite(losses) & (lengths >= 2) & (lengths.max() >= MIN_LENGTHS)
    count = np.where(known.any(axis=-1), known.sum(axis=-1), np.nan)  # (S,)
    powers = tokens ** -exponents[:, None, None]  # (P, 1, K)
    target = np.where(known, losses, 0.0)

    def mean(values: np.ndarray) -> np.ndarray:
        return (values * known).sum(axis=-1) / count

    covariance = mean(powers * target) - mean(powers) * mean(target)
    amplitude = covariance / (mean(powers**2) - mean(powers) ** 2)
    irreducible = mean(target) - amplitude * mean(powers)
    residual = irreducible[..., None] + amplitude[..., None] * powers - target
    errors = np.nansum(residual**2 * known, axis=(-2, -1))
    return irreducible, np.where(amplitude > 0, amplitude, np.nan), errors


def size_multipliers(laws: SizeLaws, means: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The multiplier of each recipe at each size, the geometric mean over its lengths: (R, S, K) -> (R, S)."""
    logs = np.ma.masked_invalid(np.log(laws.equal_tokens(means) / tokens))
    return np.exp(logs.mean(axis=-1)).filled(np.nan)


# -- all sizes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointLaw:
    """L = E + A N^-a + B (m N^g D)^-b of all recipes; the reference has m = 1 and g = 0."""

    theta: np.ndarray
    """log E, log A, log a, log B, log b, then log m of each other recipe, then their g. N and D are in units of `unit`,
    so that m is the multiplier at the middle of the sizes."""
    unit: tuple[float, float]
    """Geometric means of the sizes and lengths."""

    @property
    def constants(self) -> dict[str, float]:
        """E, A, a, B, b in plain parameters and tokens."""
        e, amplitude_n, a, amplitude_d, b = np.exp(self.theta[:5])
        return {
            "E": float(e), "A": float(amplitude_n * self.unit[0] ** a), "a": float(a),
            "B": float(amplitude_d * self.unit[1] ** b), "b": float(b),
        }  # fmt: skip

    @property
    def size_exponents(self) -> np.ndarray:
        """g of each recipe, (R,): below 0, the multiplier shrinks with size."""
        return self._by_recipe[1]

    def multipliers(self, parameters: float | np.ndarray) -> np.ndarray:
        """The multiplier of each recipe at some sizes: (...) -> (R, ...)."""
        log_size = np.log(parameters / self.unit[0])
        return np.array([np.exp(log_m + g * log_size) for log_m, g in self._by_recipe.T])

    def losses(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Of each recipe at each size and length: (S,), (K,) -> (R, S, K)."""
        law, equal_tokens = self.constants, self.multipliers(parameters)[:, :, None] * tokens
        size_term = law["A"] * parameters[:, None] ** -law["a"]
        return law["E"] + size_term + law["B"] * equal_tokens ** -law["b"]

    @property
    def _by_recipe(self) -> np.ndarray:
        """log m and g of each recipe, (2, R)."""
        return np.insert(self.theta[5:].reshape(2, -1), 0, 0.0, axis=1)


def fit_joint(means: np.ndarray, parameters: np.ndarray, tokens: np.ndarray, start: JointLaw | None = None) -> JointLaw:
    """Fit the joint law: Huber loss on log L by Levenberg and Marquardt, from a grid of starts.

    Args:
        means: (R, S, K), NaN where unknown.
        start: begin only there, for resampled losses.
    """
    unit = _mean_of_logs(parameters), _mean_of_logs(tokens)
    recipe, size, length = np.nonzero(np.isfinite(means))
    log_n, log_d = np.log(parameters[size] / unit[0]), np.log(tokens[length] / unit[1])
    target, others = np.log(means[recipe, size, length]), len(means) - 1
    is_recipe = (recipe[:, None] == np.arange(1, others + 1)).astype(float)  # (points, others)

    def predict(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log L at all points, and its derivatives."""
        e, amplitude_n, a, amplitude_d, b = np.exp(theta[:5])
        log_saved = is_recipe @ theta[5 : 5 + others] + is_recipe @ theta[5 + others :] * log_n
        size_term = amplitude_n * np.exp(-a * log_n)
        data_term = amplitude_d * np.exp(-b * (log_saved + log_d))
        columns = [
            np.full_like(log_n, e), size_term, -a * log_n * size_term, data_term,
            -b * (log_saved + log_d) * data_term,
        ]  # fmt: skip
        per_recipe = -b * data_term[:, None] * is_recipe
        loss = e + size_term + data_term
        jacobian = np.column_stack([*columns, per_recipe, per_recipe * log_n[:, None]])
        return np.log(loss), jacobian / loss[:, None]

    starts = [start.theta] if start else _starts(means, others)
    # Resampled losses need no more digits than their bands, and E and a, nearly free in small ladders, settle slowly.
    tolerance = 1e-3 if start else 1e-12
    fits = [_least_huber(predict, target, theta, tolerance) for theta in starts]
    return JointLaw(min(fits, key=lambda fitted: fitted[1])[0], unit)


def _starts(means: np.ndarray, others: int) -> list[np.ndarray]:
    lowest = float(np.nanmin(means))
    return [
        np.log([share * lowest, 0.5 * (1 - share) * lowest, a, 0.5 * (1 - share) * lowest, b, *[1.2] * others]
               + [1.0] * others)
        for share in (0.3, 0.6, 0.9) for a in (0.2, 0.5) for b in (0.2, 0.5)
    ]  # fmt: skip


def _least_huber(
    predict: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    target: np.ndarray,
    theta: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, float]:
    """Minimize the Huber loss of predict(theta) - target by Levenberg and Marquardt with reweighting.

    Args:
        tolerance: stop once a step lowers the loss by less than this fraction.

    Returns:
        theta, and its loss.
    """
    low, high = np.full(len(theta), -10.0), np.full(len(theta), 10.0)
    low[[2, 4]], high[[2, 4]] = np.log(EXPONENTS)  # a and b
    value, jacobian = predict(theta)
    loss, damping = _huber(value - target), 1e-3
    for _ in range(300):
        residual = value - target
        weight = 1 / np.maximum(np.abs(residual) / HUBER, 1.0)
        normal, slope = (jacobian.T * weight) @ jacobian, (jacobian.T * weight) @ residual
        scale = np.diag(np.maximum(np.diag(normal), 1e-9))
        tried = np.clip(theta - np.linalg.solve(normal + damping * scale, slope), low, high)
        new_value, new_jacobian = predict(tried)
        new_loss = _huber(new_value - target)
        if new_loss < loss:
            converged = loss - new_loss < tolerance * loss + 1e-18
            theta, value, jacobian, loss, damping = tried, new_value, new_jacobian, new_loss, max(damping / 4, 1e-12)
            if converged:
                break
        elif damping > 1e8:
            break
        else:
            damping *= 4
    return theta, loss


def _huber(residual: np.ndarray) -> float:
    size = np.abs(residual)
    return float(np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum())


# -- no law -----------------------------------------------------------------------------------------------------------


def tokens_to_reach(loss: float, tokens: np.ndarray, losses: np.ndarray) -> float:
    """Tokens at which a recipe has a loss, interpolated in log tokens between its own decayed runs.

    Args:
        tokens: (K,) of its runs, ascending.
        losses: (K,). NaN: not known, and skipped.

    Returns:
        0 if its shortest run is below the loss, infinity if no run reaches it, NaN if that is not known.
    """
    known = np.isfinite(losses)
    if not (math.isfinite(loss) and known.any()):
        return math.nan
    log_ratios, by_run = np.log(tokens[known] / tokens[0]), losses[known]
    reached = np.flatnonzero(by_run <= loss)
    if not reached.size:
        found = math.inf
    elif by_run[0] < loss:
        found = 0.0
    else:
        around = [reached[0], max(reached[0] - 1, 0)]
        found = float(tokens[0] * np.exp(np.interp(loss, by_run[around], log_ratios[around])))
    return found if known.all() or 0 < found < math.inf else math.nan


def _mean_of_logs(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))
