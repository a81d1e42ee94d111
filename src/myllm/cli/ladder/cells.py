"""Run the cells of a ladder, and keep their results: a loss for each, in ladder.json or ablation.json."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from myllm.cli.trials import TrialResult, finished, run_trials, seconds_per_token
from myllm.files import NONFINITE, json_safe, map_json, read_json, write_json
from myllm.formatting import format_duration, format_si, format_table
from myllm.migrations import LADDER

from .fit import Losses
from .plan import Cell


@dataclass(frozen=True)
class CellResult:
    """A finished cell."""

    cell: Cell
    loss: float
    """Validation loss at the end, nats per token; infinite if the run diverged."""
    seconds: float
    """Of training, without evaluations."""


def finished_cells(cells: Sequence[Cell]) -> dict[str, CellResult]:
    """The results there are, by the names of the runs."""
    return {cell.config.name: _of(cell, trial) for cell in cells if (trial := finished(cell.config))}


def run_cells(cells: Sequence[Cell], jobs: int, expected: Mapping[str, float]) -> list[CellResult]:
    """Run the cells that are not complete, and print a line for each, with the time that the rest will take.

    `expected` has the seconds of each run by its name. Returns the results in the order of the cells.
    """
    results, by_name = finished_cells(cells), {cell.config.name: cell for cell in cells}
    left = [cell.config for name, cell in by_name.items() if name not in results]
    started, finished_s, left_s = time.monotonic(), 0.0, sum(expected[config.name] for config in left)
    for number, trial in enumerate(run_trials(left, jobs), 1):
        cell = by_name[trial.name]
        result = results[trial.name] = _of(cell, trial)
        finished_s += expected[trial.name]
        eta_s = (left_s - finished_s) * (time.monotonic() - started) / finished_s
        print(
            f"{number}/{len(left)}  {cell.recipe} width {cell.width} {format_si(cell.tokens)} tokens seed {cell.seed}: "
            f"loss {result.loss:.4f} in {format_duration(result.seconds)}  left {format_duration(eta_s)}",
            flush=True,
        )
    return [results[cell.config.name] for cell in cells]


def _of(cell: Cell, trial: TrialResult) -> CellResult:
    return CellResult(cell, math.inf if trial.loss is None else trial.loss, trial.seconds)


# -- hours ------------------------------------------------------------------------------------------------------------


def describe_cost(cells: Sequence[Cell], expected: Mapping[str, float], jobs: int) -> str:
    """Runs that are left, and their time."""
    left = {cell.config.name for cell in cells} - finished_cells(cells).keys()
    if not left:
        return f"all {len(cells)} runs are there"
    seconds = sum(expected[name] for name in left)
    return (
        f"{len(left)} of {len(cells)} runs are left: {format_duration(seconds)} of training, about "
        f"{format_duration(seconds / jobs)} with --jobs {jobs}"
    )


def expected_seconds(cells: Sequence[Cell], jobs: int) -> dict[str, float]:
    """Seconds of each run by its name: those it took, or its tokens x the seconds per token of its width.

    A width without a finished run is measured now, by a run of a few steps of each recipe.
    """
    done = finished_cells(cells)
    known = {(result.cell.recipe, result.cell.width): result.seconds / result.cell.tokens for result in done.values()}
    unknown = {(cell.recipe, cell.width): cell for cell in reversed(cells) if (cell.recipe, cell.width) not in known}
    speeds = seconds_per_token([cell.config for cell in unknown.values()], jobs)
    known |= dict(zip(unknown, speeds, strict=True))
    took = {name: result.seconds for name, result in done.items() if result.seconds}
    return {cell.config.name: cell.tokens * known[cell.recipe, cell.width] for cell in cells} | took


# -- ladder.json ------------------------------------------------------------------------------------------------------


def tabulate(results: Sequence[CellResult], recipes: Sequence[str]) -> tuple[Losses, np.ndarray]:
    """The losses, and the seconds of training, (R, S, K, J)."""
    cells = [result.cell for result in results]
    widths, lengths = sorted({cell.width for cell in cells}), sorted({cell.tokens for cell in cells})
    axes = recipes, widths, lengths, sorted({cell.seed for cell in cells})
    losses, seconds = (np.full([len(axis) for axis in axes], np.nan) for _ in range(2))
    parameters = np.zeros(len(widths))
    for result in results:
        cell = result.cell
        values = cell.recipe, cell.width, cell.tokens, cell.seed
        place = tuple(axis.index(value) for axis, value in zip(axes, values, strict=True))
        losses[place], seconds[place] = result.loss, result.seconds
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


def describe_cell(result: CellResult) -> dict[str, Any]:
    """One cell as JSON."""
    cell, optim = result.cell, result.cell.config.optim
    return {
        "run": cell.config.name, "recipe": cell.recipe, "width": cell.width, "parameters": cell.parameters,
        "tokens": cell.tokens, "seed": cell.seed, "loss": result.loss, "seconds": round(result.seconds, 2),
        "max_lr": optim.max_lr, "muon_lr": optim.muon_lr if optim.optimizer == "muon" else None,
        "weight_decay": optim.weight_decay,
    }  # fmt: skip


def write_results(path: Path, content: dict[str, Any]) -> None:
    write_json(path, LADDER.stamp(json_safe(content)))


def read_results(path: Path) -> dict[str, Any]:
    """ladder.json or ablation.json."""
    content = map_json(lambda leaf: NONFINITE.get(leaf, leaf) if isinstance(leaf, str) else leaf, read_json(path))
    return LADDER.upgrade(content, path)
