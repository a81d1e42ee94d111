"""Run the cells of a ladder and read their results."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from myllm.cli.trials import TrialResult, finished, run_trials
from myllm.errors import UserError
from myllm.formatting import format_duration, format_si

from .plan import Cell


@dataclass(frozen=True)
class CellResult:
    """A finished cell."""

    cell: Cell
    loss: float
    """Validation loss at the end, nats per token; infinite if the run diverged."""
    seconds: float
    """Of training, without evaluations."""


def read_cell(cell: Cell) -> CellResult | None:
    """The result of a cell; None if its run is not complete."""
    result = finished(cell.config)
    return _of(cell, result) if result else None


def finished_cells(cells: Sequence[Cell]) -> list[CellResult]:
    """The results there are.

    Raises:
        UserError: there are none.
    """
    results = [result for cell in cells if (result := read_cell(cell))]
    if not results:
        raise UserError(f"none of the {len(cells)} runs is finished; train them first, without --finished")
    return results


def run_cells(cells: Sequence[Cell], jobs: int, expected: dict[str, float] | None = None) -> list[CellResult]:
    """Run the cells that are not complete, and print a line for each, with the time that the rest will take.

    Args:
        expected: seconds of each run by its name. None: print nothing.

    Returns:
        the results, in the order of the cells.
    """
    by_name = {cell.config.name: cell for cell in cells}
    results = {name: result for name, cell in by_name.items() if (result := read_cell(cell))}
    left = [cell for name, cell in by_name.items() if name not in results]
    started, finished_s = time.monotonic(), 0.0
    for number, trial in enumerate(run_trials([cell.config for cell in left], jobs), 1):
        result = _of(by_name[trial.name], trial)
        results[trial.name] = result
        if expected:
            finished_s += expected[trial.name]
            rest_s = sum(expected[cell.config.name] for cell in left) - finished_s
            eta_s = rest_s * (time.monotonic() - started) / finished_s
            print(f"{number}/{len(left)}  {describe_result(result)}  left {format_duration(eta_s)}", flush=True)
    return [results[cell.config.name] for cell in cells]


def describe_result(result: CellResult) -> str:
    cell = result.cell
    return (
        f"{cell.recipe} width {cell.width} {format_si(cell.tokens)} tokens seed {cell.seed}: loss {result.loss:.4f} in "
        f"{format_duration(result.seconds)}"
    )


def _of(cell: Cell, trial: TrialResult) -> CellResult:
    return CellResult(cell, math.inf if trial.loss is None else trial.loss, trial.seconds)
