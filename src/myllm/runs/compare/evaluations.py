"""Evaluations of several runs side by side: those of training, then those that `myllm eval` added to eval.json."""

import math
from collections.abc import Callable, Iterator, Sequence

from myllm.runs.eval_results import Result
from myllm.runs.history import Row, as_float
from myllm.runs.report.evaluations import error_text, eval_columns, newest_results, settings_text, shown_metrics

from .curves import ComparedRun
from .tables import Cell, Table


def evaluations(runs: Sequence[ComparedRun]) -> Table:
    """One row for each run, one column for each question: its newest answer, with its standard error and its step."""
    columns = [*_of_training(runs), *_of_eval_command(runs)]
    if not columns:
        return Table([], [])
    rows = [[Cell(run.name), *(cells[index] for _, cells in columns)] for index, run in enumerate(runs)]
    return Table([Cell("Run"), *(heading for heading, _ in columns)], rows)


def _of_training(runs: Sequence[ComparedRun]) -> Iterator[tuple[Cell, list[Cell]]]:
    """The columns of the loop's own evaluations."""
    group = ""
    for column in {(c.name, c.key): c for run in runs for c in eval_columns(run.metrics)}.values():
        group = column.group or group
        rows = [run.metrics.last(column.name) for run in runs]
        cells = [_cell(row, column.key, column.format_value, row.get("step")) for row in rows]
        yield Cell(f"{group} {column.title}", detail="in training"), cells


def _of_eval_command(runs: Sequence[ComparedRun]) -> Iterator[tuple[Cell, list[Cell]]]:
    """The columns of eval.json. Runs share a column only where task, settings and kind of weights are the same."""
    newest = [newest_results(run.results) for run in runs]
    questions: dict[str, Result] = {name: result for by_name in newest for name, result in by_name.items()}
    for name, example in questions.items():
        found = [by_name.get(name) for by_name in newest]
        for key, title, write in shown_metrics(example):
            heading = Cell(title, detail=f"myllm eval: {settings_text(example)}")
            yield heading, [_cell(row.metrics, key, write, row.step) if row else Cell("") for row in found]


def _cell(row: Row, key: str, write: Callable[[float], str], step: int | None) -> Cell:
    value = as_float(row.get(key))
    if not math.isfinite(value):
        return Cell("")
    details = [error_text(row, key, write), f"step {step:,}" if step is not None else ""]
    return Cell(write(value), value, ", ".join(filter(None, details)))
