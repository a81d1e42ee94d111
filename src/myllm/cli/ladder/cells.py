"""Run the cells of a ladder, and keep their results: a loss for each, in ladder.json or ablation.json."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from myllm.cli.trials import TrialResult, finished, run_trials, seconds_per_token
from myllm.files import NONFINITE, json_safe, map_json, read_json, write_json
from myllm.formatting import format_duration, format_si, format_table
from myllm.migrations import LADDER

from .fit import Losses
from .plan import Cell

Results = Sequence[tuple[Cell, TrialResult]]
"""Finished cells."""


def finished_cells(cells: Sequence[Cell]) -> Results:
    return [(cell, trial) for cell in cells if (trial := finished(cell.config))]


def seconds_left(cells: Sequence[Cell], jobs: int) -> dict[str, float]:
    """Seconds of each run that is not complete, by its name: its tokens x the seconds per token of its width.

    A width without a finished run is measured now, by a run of a few steps of each recipe.
    """
    done = finished_cells(cells)
    speeds = {(cell.recipe, cell.width): trial.seconds / cell.tokens for cell, trial in done}
    unknown = {(cell.recipe, cell.width): cell for cell in reversed(cells) if (cell.recipe, cell.width) not in speeds}
    measured = seconds_per_token([cell.config for cell in unknown.values()], jobs)
    speeds |= dict(zip(unknown, measured, strict=True))
    names = {trial.name for _, trial in done}
    return {
        cell.config.name: cell.tokens * speeds[cell.recipe, cell.width]
        for cell in cells
        if cell.config.name not in names
    }


def describe_left(cells: Sequence[Cell], left: Mapping[str, float], jobs: int) -> str:
    """Runs that are left, and their time."""
    if not left:
        return f"all {len(cells)} runs are there"
    seconds = sum(left.values())
    return (
        f"{len(left)} of {len(cells)} runs are left: {format_duration(seconds)} of training, about "
        f"{format_duration(seconds / jobs)} with --jobs {jobs}"
    )


def run_cells(cells: Sequence[Cell], left: Mapping[str, float], jobs: int) -> Results:
    """Run the cells that are left, and print a line for each, with the time that the rest will take.

    `left` is as `seconds_left` returns it. Returns the results of all cells, in their order.
    """
    by_name = {cell.config.name: cell for cell in cells}
    started, finished_s = time.monotonic(), 0.0
    for number, trial in enumerate(run_trials([by_name[name].config for name in left], jobs), 1):
        cell = by_name[trial.name]
        finished_s += left[trial.name]
        eta_s = (sum(left.values()) - finished_s) * (time.monotonic() - started) / finished_s
        print(
            f"{number}/{len(left)}  {cell.recipe} width {cell.width} {format_si(cell.tokens)} tokens seed {cell.seed}: "
            f"loss {trial.loss:.4f} in {format_duration(trial.seconds)}  left {format_duration(eta_s)}",
            flush=True,
        )
    return finished_cells(cells)


# -- ladder.json ------------------------------------------------------------------------------------------------------


def tabulate(results: Results, recipes: Sequence[str]) -> tuple[Losses, np.ndarray]:
    """The losses, and the seconds of training, (R, S, K, J)."""
    cells = [cell for cell, _ in results]
    widths, lengths = sorted({cell.width for cell in cells}), sorted({cell.tokens for cell in cells})
    axes = recipes, widths, lengths, sorted({cell.seed for cell in cells})
    losses, seconds = (np.full([len(axis) for axis in axes], np.nan) for _ in range(2))
    parameters = np.zeros(len(widths))
    for cell, trial in results:
        values = cell.recipe, cell.width, cell.tokens, cell.seed
        place = tuple(axis.index(value) for axis, value in zip(axes, values, strict=True))
        losses[place], seconds[place] = trial.loss, trial.seconds
        if cell.recipe == recipes[0]:
            parameters[place[1]] = cell.parameters
    return Losses(tuple(recipes), parameters, np.array(lengths, dtype=np.float64), losses), seconds


def describe_losses(losses: Losses, widths: Sequence[int]) -> str:
    """The mean loss of each cell, and the standard error over seeds; a row for each recipe and width."""
    rows = [["recipe", "width", *(format_si(tokens) for tokens in losses.tokens)]]
    for recipe, name in enumerate(losses.recipes):
        for size, width in enumerate(widths):
            cells = zip(losses.means[recipe, size], losses.standard_errors[recipe, size], strict=True)
            texts = [
                "" if np.isnan(mean) else f"{mean:.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}")
                for mean, error in cells
            ]
            rows.append([name, str(width), *texts])
    return format_table(rows, right=range(1, len(rows[0])))


def describe_cell(cell: Cell, trial: TrialResult) -> dict[str, Any]:
    """One cell as JSON."""
    optim = cell.config.optim
    return {
        "run": cell.config.name, "recipe": cell.recipe, "width": cell.width, "parameters": cell.parameters,
        "tokens": cell.tokens, "seed": cell.seed, "loss": trial.loss, "seconds": round(trial.seconds, 2),
        "max_lr": optim.max_lr, "muon_lr": optim.muon_lr if optim.optimizer == "muon" else None,
        "weight_decay": optim.weight_decay,
    }  # fmt: skip


def write_results(path: Path, content: dict[str, Any]) -> None:
    write_json(path, LADDER.stamp(json_safe(content)))


def read_results(path: Path) -> dict[str, Any]:
    """ladder.json or ablation.json."""
    content = map_json(lambda leaf: NONFINITE.get(leaf, leaf) if isinstance(leaf, str) else leaf, read_json(path))
    return LADDER.upgrade(content, path)
