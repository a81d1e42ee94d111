"""Stage 1 of a ladder: the best learning rates of each recipe at its two smallest widths and the middle length.

Rates are tried in factors of two around a first guess; a parabola through the best three in log rate gives the optimum.
With Muon, both rates are scaled together at first, then AdamW's alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
Key = tuple[str, int]
"""Recipe and width."""


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


def search_lines(cells: Mapping[Key, Callable[[int], Cell]], powers: Sequence[int], run: Run) -> dict[Key, Line]:
    """Try powers of two, and further ones while the best lies at an edge, in rounds: each trains what all want next."""
    losses: dict[Key, dict[int, float]] = {key: {} for key in cells}
    wanted = {key: list(powers) for key in cells}
    reach = range(min(powers) - MAX_EXTENSIONS, max(powers) + MAX_EXTENSIONS + 1)
    while wanted:
        found = iter(run([cells[key](power) for key, tried in wanted.items() for power in tried]))
        for key, tried in wanted.items():
            losses[key] |= {power: next(found) for power in tried}
        beyond = {key: Line(losses[key]).beyond for key in wanted}
        wanted = {key: [power] for key, power in beyond.items() if power is not None and power in reach}
    return {key: Line(tried) for key, tried in losses.items()}


def search_rates(
    recipes: Mapping[str, RunConfig], grid: Grid, run: Run
) -> tuple[dict[str, RecipeRates], list[dict[str, Any]]]:
    """The rates of all recipes, and for each recipe and width the losses by rate, for the report.

    Raises:
        UserError: an optimum lies at an edge of what was tried.
    """
    widths = grid.widths[:2]
    keys = [(name, width) for name in recipes for width in widths]

    def cell(key: Key, muon: int | None, power: int) -> Cell:
        """With max_lr at a power of two of its guess; muon_lr at its own, or with None at the same."""
        (name, width), base = key, 0 if muon is None else muon
        guess = first_guess(recipes[name], width)
        optim = replace(
            guess, max_lr=guess.max_lr * 2.0 ** (base + power),
            muon_lr=guess.muon_lr * 2.0 ** (power if muon is None else muon),
        )  # fmt: skip
        return make_cell(name, recipes[name], grid, (width, grid.middle_length, SEED), optim)

    together = search_lines({key: partial(cell, key, None) for key in keys}, TOGETHER, run)
    muon = [key for key in keys if recipes[key[0]].optim.optimizer == "muon"]
    alone = search_lines({key: partial(cell, key, together[key].best) for key in muon}, ALONE, run)
    names = {key: "muon_lr and max_lr" if key in muon else "max_lr" for key in keys}
    edges = [(*key, names[key], line) for key, line in together.items() if line.beyond is not None]
    edges += [(*key, "max_lr alone", line) for key, line in alone.items() if line.beyond is not None]
    if edges:
        raise _edge_error(edges)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in recipes}
    record = []
    for name, width in keys:
        key, guess = (name, width), first_guess(recipes[name], width)
        pair, single = together[key], alone.get(key)
        row = {"max_lr": guess.max_lr * 2.0 ** (pair.best + single.optimum if single else pair.optimum)}
        if key in muon:
            row["muon_lr"] = guess.muon_lr * 2.0**pair.optimum
        found[name][width] = row
        record.append({
            "recipe": name, "width": width, "guess": {setting: getattr(guess, setting) for setting in row},
            "losses": {str(n): loss for n, loss in sorted(pair.losses.items())}, "optimum": row,
            "max_lr_alone": {str(n): loss for n, loss in sorted(single.losses.items())} if single else None,
        })  # fmt: skip
    return {name: RecipeRates(grid.middle_length, by_width) for name, by_width in found.items()}, record


def _edge_error(edges: Sequence[tuple[str, int, str, Line]]) -> UserError:
    lines = []
    for name, width, setting, line in edges:
        side = "highest" if line.best == max(line.losses) else "lowest"
        tried = ", ".join(f"x{2.0**power:g} {loss:.4f}" for power, loss in sorted(line.losses.items()))
        lines.append(f"{name}, width {width}, {setting}: the {side} is the best (factor and loss: {tried})")
    return UserError(
        "no fit: an optimum lies at the edge of the rates that were tried, so the recipes are not equally tuned:\n"
        f"{bullets(lines)}\ngive better rates with --rates FILE.json, or correct the recipe's own"
    )


def check_rule(
    recipes: Mapping[str, RunConfig], grid: Grid, rates: Mapping[str, RecipeRates], run: Run
) -> list[dict[str, Any]]:
    """Compare the rates that the rule gives at the largest width with lower and higher ones."""
    width, rows = grid.widths[-1], []
    cells = []
    for name, recipe in recipes.items():
        optim = rates[name].at(recipe.optim, width, grid.middle_length)
        for factor in CHECKED:
            scaled = replace(optim, max_lr=optim.max_lr * factor, muon_lr=optim.muon_lr * factor)
            cells.append(make_cell(name, recipe, grid, (width, grid.middle_length, SEED), scaled))
    losses = iter(run(cells))
    for name in recipes:
        found = {factor: next(losses) for factor in CHECKED}
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
