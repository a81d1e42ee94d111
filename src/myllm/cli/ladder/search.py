"""Stage 1 of a ladder: the best learning rates of each recipe at its two smallest widths and the middle length.

Rates are tried in factors of two around a first guess; a parabola through the best three in log rate gives the optimum.
With Muon, both rates are scaled together at first, then AdamW's alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from myllm.config import OptimConfig, RunConfig
from myllm.errors import UserError, bullets

from .plan import Cell, Grid, make_cell
from .rates import RecipeRates

SEED = 0
TOGETHER, ALONE = (-2, -1, 0, 1, 2), (-1, 0, 1)
"""Powers of two that are tried first."""
MAX_EXTENSIONS = 2
"""Further points at each side while the best one lies at an edge."""
CHECKED = (0.7, 1.0, 1.4)
"""Factors of the rate at the largest width, to check the rule that carried it there."""

Run = Callable[[Sequence[Cell]], Sequence[float]]
"""Trains cells and returns their losses."""


class Key(NamedTuple):
    """What has a learning rate of its own."""

    recipe: str
    width: int


@dataclass(frozen=True)
class Line:
    """Losses at powers of two of a rate."""

    losses: Mapping[int, float]

    @property
    def best(self) -> int:
        return min(self.losses, key=lambda power: self.losses[power])

    @property
    def beyond(self) -> int | None:
        """The power to try next if the best is at an edge."""
        lowest, highest = min(self.losses), max(self.losses)
        return {lowest: lowest - 1, highest: highest + 1}.get(self.best)

    @property
    def optimum(self) -> float:
        """The power of two at the lowest point of the parabola through the best loss and its neighbors."""
        below, middle, above = (self.losses.get(self.best + shift, math.inf) for shift in (-1, 0, 1))
        bend = below - 2 * middle + above
        return self.best + ((below - above) / (2 * bend) if 0 < bend < math.inf else 0.0)


def first_guess(recipe: RunConfig, width: int) -> OptimConfig:
    """The recipe's rates times sqrt(its width / width): smaller models bear higher rates.

    In a pilot at width 64, the best rates of three recipes for width 1,024 were 3 to 7 times their own.
    """
    factor = math.sqrt(recipe.model.d_model / width)
    return replace(recipe.optim, max_lr=recipe.optim.max_lr * factor, muon_lr=recipe.optim.muon_lr * factor)


def guessed_rates(recipes: Mapping[str, RunConfig], grid: Grid) -> dict[str, RecipeRates]:
    """The first guesses as rates, for a plan."""
    found = {}
    for name, recipe in recipes.items():
        guesses = {width: first_guess(recipe, width) for width in grid.widths}
        by_width = {width: {"max_lr": optim.max_lr, "muon_lr": optim.muon_lr} for width, optim in guesses.items()}
        found[name] = RecipeRates(grid.middle_length, by_width)
    return found


def count_runs(recipes: Mapping[str, RunConfig], grid: Grid) -> int:
    """Runs of stage 1, without extensions."""
    widths = len(grid.widths[:2])
    muon = sum(recipe.optim.optimizer == "muon" for recipe in recipes.values())
    per_recipe = len(TOGETHER) * widths + len(CHECKED)
    return per_recipe * len(recipes) + (len(ALONE) - 1) * widths * muon


def search_lines(keys: list[Key], cell: Callable[[Key, int], Cell], powers: Sequence[int], run: Run) -> dict[Key, Line]:
    """Try powers of two, and further ones while the best lies at an edge, in rounds: each trains what all want next."""
    losses: dict[Key, dict[int, float]] = {key: {} for key in keys}
    wanted = [(key, power) for key in keys for power in powers]
    reach = range(min(powers) - MAX_EXTENSIONS, max(powers) + MAX_EXTENSIONS + 1)
    while wanted:
        for (key, power), loss in zip(wanted, run([cell(*point) for point in wanted]), strict=True):
            losses[key][power] = loss
        beyond = {key: Line(losses[key]).beyond for key, _ in wanted}
        wanted = [(key, power) for key, power in beyond.items() if power is not None and power in reach]
    return {key: Line(by_power) for key, by_power in losses.items()}


def search_rates(
    recipes: Mapping[str, RunConfig], grid: Grid, run: Run
) -> tuple[dict[str, RecipeRates], list[dict[str, Any]]]:
    """The rates of all recipes, and for each recipe and width the losses by rate, for the report.

    Raises:
        UserError: an optimum lies at an edge of what was tried.
    """
    keys = [Key(recipe, width) for recipe in recipes for width in grid.widths[:2]]
    guesses = {key: first_guess(recipes[key.recipe], key.width) for key in keys}

    def cell(key: Key, max_lr_power: int, muon_lr_power: int) -> Cell:
        guess = guesses[key]
        max_lr, muon_lr = guess.max_lr * 2.0**max_lr_power, guess.muon_lr * 2.0**muon_lr_power
        optim = replace(guess, max_lr=max_lr, muon_lr=muon_lr)
        return make_cell(key.recipe, recipes[key.recipe], grid, (key.width, grid.middle_length, SEED), optim)

    together = search_lines(keys, lambda key, power: cell(key, power, power), TOGETHER, run)
    best = {key: line.best for key, line in together.items()}
    muon = [key for key in keys if guesses[key].optimizer == "muon"]
    alone = search_lines(muon, lambda key, power: cell(key, best[key] + power, best[key]), ALONE, run)
    _check_edges(together, alone)
    rates: dict[str, dict[int, dict[str, float]]] = {recipe: {} for recipe in recipes}
    record = []
    for key in keys:
        optimum = rates[key.recipe][key.width] = _optimum(guesses[key], together[key], alone.get(key))
        record.append({
            "recipe": key.recipe, "width": key.width,
            "guess": {setting: getattr(guesses[key], setting) for setting in optimum},
            "losses": _by_power(together[key]), "optimum": optimum,
            "max_lr_alone": _by_power(alone[key]) if key in alone else None,
        })  # fmt: skip
    return {recipe: RecipeRates(grid.middle_length, by_width) for recipe, by_width in rates.items()}, record


def _optimum(guess: OptimConfig, together: Line, alone: Line | None) -> dict[str, float]:
    """The best rates. Powers are of `guess`; those of `alone` come on top of the best one of `together`."""
    if alone is None:  # muon_lr has no effect
        return {"max_lr": guess.max_lr * 2.0**together.optimum}
    max_lr = guess.max_lr * 2.0 ** (together.best + alone.optimum)
    return {"max_lr": max_lr, "muon_lr": guess.muon_lr * 2.0**together.optimum}


def _by_power(line: Line) -> dict[str, float]:
    return {str(power): loss for power, loss in sorted(line.losses.items())}


def _check_edges(together: Mapping[Key, Line], alone: Mapping[Key, Line]) -> None:
    edges = [(key, "muon_lr and max_lr" if key in alone else "max_lr", line) for key, line in together.items()]
    edges += [(key, "max_lr alone", line) for key, line in alone.items()]
    lines = []
    for key, setting, line in edges:
        if line.beyond is None:
            continue
        side = "highest" if line.best == max(line.losses) else "lowest"
        tried = ", ".join(f"x{2.0**power:g} {loss:.4f}" for power, loss in sorted(line.losses.items()))
        lines.append(f"{key.recipe}, width {key.width}, {setting}: the {side} is the best (factor and loss: {tried})")
    if lines:
        raise UserError(
            "no fit: an optimum lies at the edge of the rates that were tried, so the recipes are not equally tuned:\n"
            f"{bullets(lines)}\ngive better rates with --rates FILE.json, or correct the recipe's own"
        )


def check_rule(
    recipes: Mapping[str, RunConfig], grid: Grid, rates: Mapping[str, RecipeRates], run: Run
) -> list[dict[str, Any]]:
    """Compare the rates that the rule gives at the largest width with lower and higher ones."""
    width = grid.widths[-1]

    def cell(name: str, factor: float) -> Cell:
        optim = rates[name].at(recipes[name].optim, width, grid.middle_length)
        scaled = replace(optim, max_lr=optim.max_lr * factor, muon_lr=optim.muon_lr * factor)
        return make_cell(name, recipes[name], grid, (width, grid.middle_length, SEED), scaled)

    tried = [(name, factor) for name in recipes for factor in CHECKED]
    losses = dict(zip(tried, run([cell(*point) for point in tried]), strict=True))
    rows = []
    for name in recipes:
        found = {factor: losses[name, factor] for factor in CHECKED}
        rows.append({
            "recipe": name, "width": width, "losses": {f"{factor:g}": loss for factor, loss in found.items()},
            "cost": found[1.0] - min(found.values()),
        })  # fmt: skip
    return rows


def describe_search(record: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]]) -> str:
    """What stage 1 found, in words."""
    lines = []
    for row in record:
        best = ", ".join(f"{name} {value:.3g}" for name, value in row["optimum"].items())
        low, *_, high = sorted(row["losses"], key=int)
        lines.append(
            f"{row['recipe']} width {row['width']}: {best} (tried x{2.0 ** int(low):g} to x{2.0 ** int(high):g}, "
            f"lowest loss {min(row['losses'].values()):.4f})"
        )
    for check in checks:
        tried = ", ".join(f"x{factor} {loss:.4f}" for factor, loss in check["losses"].items())
        cost = check["cost"]
        verdict = f"the rule costs {cost:.4f} nats here" if cost else "the rule holds"
        lines.append(f"{check['recipe']} width {check['width']}, checked: {tried}: {verdict}")
    return "\n".join(lines)
