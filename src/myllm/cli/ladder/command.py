"""The command `myllm ladder RECIPE RECIPE ...`."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from myllm import paths
from myllm.cli.parse import parse_arguments
from myllm.config import RunConfig
from myllm.data.find import find_dataset
from myllm.errors import UserError
from myllm.files import read_json
from myllm.formatting import format_si

from .ablation import analyze_ablation, describe_ablation, plan_ablation
from .analysis import Target, analyze
from .cells import (
    Results,
    describe_cell,
    describe_left,
    describe_losses,
    finished_cells,
    run_cells,
    seconds_left,
    tabulate,
    write_results,
)
from .plan import Cell, Grid, check_grid, count_matrices, describe_plan, load_recipes, plan_cells
from .rates import RecipeRates, read_rates, write_rates
from .search import check_rule, count_runs, describe_search, guessed_rates, search_rates

OWN = "own"


@dataclass(frozen=True)
class LadderArgs:
    """Command-line arguments of `myllm ladder`."""

    recipes: tyro.conf.Positional[tuple[str, ...]]
    """Presets, or config files. The first is the reference of the fits."""
    dataset: Annotated[str, tyro.conf.arg(name="data.dataset")]
    """A prepared data set. Its vocabulary is that of the models."""
    name: str = "default"
    """Name of the ladder: results are in temp_data/ladder/NAME, runs in temp_data/runs/ladder-NAME-*."""
    widths: tuple[int, ...] = (48, 64, 96)
    """d_model of each size. d_ff keeps the recipe's ratio."""
    layers: int = 4
    """Blocks, at every size."""
    head_dim: int = 16
    """Width of a head, at every size."""
    seq_len: int = 256
    """Context length."""
    batch_tokens: int = 2_048
    """Tokens per step."""
    tokens: tuple[int, ...] = (800_000, 1_600_000, 3_300_000)
    """Lengths of the runs, such as 0.8M 1.6M 3.3M."""
    seeds: int = 2
    """Runs of each cell. Seeds are paired: the same weights' seed and data order for every recipe."""
    validation_tokens: int = 81_920
    """Held-out tokens to measure the final losses on."""
    max_epochs: float = 1.0
    """How often a run may read the data set."""
    rates: str | None = None
    """Learning rates: a rates file, or own for each recipe's own (default: those of the first
    start, or else a search)."""
    ablate: str | None = None
    """Instead of a ladder: take one part at a time off this recipe, at the second width and the middle length."""
    base: Annotated[str, tyro.conf.arg(name="from")] = "lf-llm-269m"
    """With --ablate: the recipe whose parts come in place of those that are off."""
    jobs: int = 1
    """Runs at once. Each has its share of the cores."""
    budget: bool = False
    """Print the plan with its hours, and stop."""
    finished: bool = False
    """Train nothing: fit the runs that are finished, such as those of a ladder that is still training."""


def ladder(words: list[str]) -> None:
    """Train recipes at several sizes and lengths, and fit how many tokens one saves.

    Every cell is a whole decayed run in an ordinary run folder. The same command continues an interrupted ladder; with
    more seeds, widths or lengths it adds the cells that are missing. See docs/ladder.md.
    """
    args = parse_arguments(LadderArgs, words, "myllm ladder", description=inspect.getdoc(ladder))
    if args.ablate is not None:
        ablate(args.ablate, args)
        return
    if len(args.recipes) < 2:
        raise UserError("a ladder compares at least two recipes: give presets or config files")
    recipes, grid = load_recipes(args.recipes), make_grid(args)
    rates = known_rates(args, recipes, grid)
    if rates is None and args.budget:
        print(
            f"stage 1: about {count_runs(recipes, grid)} runs of {format_si(grid.middle_length)} tokens to find each "
            "recipe's rates; the plan below has first guesses"
        )
        rates = guessed_rates(recipes, grid)
    rates = rates or tune_rates(args, recipes, grid)
    cells = plan_cells(recipes, grid, rates, args.seeds)
    print(describe_plan(recipes, grid, rates, cells), flush=True)
    if results := train_cells(args, cells):
        print(finish(args.name, recipes, grid, results))


def train_cells(args: LadderArgs, cells: Sequence[Cell]) -> Results:
    """The results of the cells, after their training; none if only the budget is wanted."""
    if args.finished:
        if not (results := finished_cells(cells)):
            raise UserError(f"none of the {len(cells)} runs is finished; train them first, without --finished")
        return results
    left = seconds_left(cells, args.jobs)
    print(f"\n{describe_left(cells, left, args.jobs)}", flush=True)
    return [] if args.budget else run_cells(cells, left, args.jobs)


def finish(name: str, recipes: Mapping[str, RunConfig], grid: Grid, results: Results) -> str:
    """Fit the laws and write ladder.json. Returns what to print."""
    losses, seconds = tabulate(results, list(recipes))
    reference = next(iter(recipes.values()))
    target = Target(
        reference.name, count_matrices(reference.model), reference.train.max_steps * reference.train.batch_tokens
    )
    analysis = analyze(losses, seconds, target)
    path = paths.ladder_dir(name) / "ladder.json"
    write_results(path, {
        "name": name, "dataset": grid.dataset.name, "recipes": list(recipes), "widths": list(grid.widths),
        "cells": [describe_cell(*result) for result in results], "rates": read_json(rates_file(name)),
        "analysis": analysis,
    })  # fmt: skip
    from .report import describe_analysis, write_report  # Matplotlib takes a second

    return (
        f"\nvalidation loss, nats per token\n{describe_losses(losses, grid.widths)}\n\n"
        f"{describe_analysis(analysis)}\n\n"
        f"report   {write_report(path.parent)}\nnumbers  {path}"
    )


def ablate(recipe: str, args: LadderArgs) -> None:
    """The mode of --ablate."""
    if args.recipes:
        raise UserError("--ablate takes the recipe itself: give no others")
    recipes, grid = load_recipes([recipe, args.base]), make_grid(args)
    rates = known_rates(args, recipes, grid)
    if rates is None:
        raise UserError("--ablate needs rates: --rates FILE.json or own, or the --name of a ladder of both recipes")
    results = train_cells(args, plan_ablation(recipes, grid, rates, args.seeds))
    if not results:
        return
    found = analyze_ablation(results)
    path = paths.ladder_dir(args.name) / "ablation.json"
    write_results(path, found | {"cells": [describe_cell(*result) for result in results]})
    print(f"\n{describe_ablation(found)}\n\nnumbers  {path}")
    if (path.parent / "ladder.json").is_file():
        from .report import write_report

        print(f"report   {write_report(path.parent)}")


def make_grid(args: LadderArgs) -> Grid:
    """Raises a UserError for an unknown data set, or sizes and lengths that cannot be trained."""
    for option, value in {"--widths": args.widths, "--tokens": args.tokens, "--seeds": args.seeds}.items():
        if not value or min(value if isinstance(value, tuple) else (value,)) < 1:
            raise UserError(f"{option} is {value}, expected whole numbers above 0")
    grid = Grid(
        args.name, find_dataset(args.dataset), tuple(sorted(set(args.widths))), tuple(sorted(set(args.tokens))),
        args.layers, args.head_dim, args.seq_len, args.batch_tokens, args.validation_tokens,
    )  # fmt: skip
    check_grid(grid, args.max_epochs)
    return grid


def known_rates(args: LadderArgs, recipes: Mapping[str, RunConfig], grid: Grid) -> dict[str, RecipeRates] | None:
    """The rates that --rates names, or those with which the ladder was started; None if they are to be searched.

    They are saved in the ladder's rates.json, so that a later start with more lengths has the same cells.
    """
    path = rates_file(args.name)
    if args.rates is None:
        return read_rates(path, list(recipes)) if path.is_file() else None
    if args.rates == OWN:
        rates = {name: RecipeRates(grid.middle_length) for name in recipes}
    else:
        rates = read_rates(paths.user_path(args.rates), list(recipes))
    if not args.budget:
        write_rates(path, rates)
    return rates


def tune_rates(args: LadderArgs, recipes: Mapping[str, RunConfig], grid: Grid) -> dict[str, RecipeRates]:
    """Stage 1: search the rates, check their rule, and save them."""

    def run(cells: Sequence[Cell]) -> list[float]:
        return [trial.loss for _, trial in run_cells(cells, seconds_left(cells, args.jobs), args.jobs)]

    print("stage 1: rates of each recipe", flush=True)
    rates, record = search_rates(recipes, grid, run)
    checks = check_rule(recipes, grid, rates, run)
    print(describe_search(record, checks) + "\n", flush=True)
    write_rates(rates_file(args.name), rates, search=record, checks=checks)
    return rates


def rates_file(name: str) -> Path:
    return paths.ladder_dir(name) / "rates.json"
