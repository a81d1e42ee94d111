"""Evaluations of several runs side by side: those of training, then those that `myllm eval` added to eval.json."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from myllm.formatting import format_percent, format_si
from myllm.runs.eval_results import Result
from myllm.runs.history import TASK_TITLES, Row, accuracy_key, as_float
from myllm.runs.report.html import as_text, eval_columns, format_loss, format_perplexity

from .curves import ComparedRun
from .tables import Cell, Table

TITLES = {"perplexity": "Text", "summary": "Public tasks"} | TASK_TITLES
SHOWN = {
    "loss": ("loss", format_loss),
    "bits_per_byte": ("bits per byte", format_loss),
    "acc": ("accuracy", format_percent),
    "acc_norm": ("accuracy", format_percent),
    "perplexity": ("perplexity", format_perplexity),
    "centered_mean": ("mean above chance", format_percent),
    "repetition": ("repetition", format_percent),
    "distinct_2": ("distinct pairs", format_percent),
    "decode_tokens_per_s_1": ("tokens per second", format_si),
    "perplexity_cost_percent": ("cost in perplexity, %", "{:+.2f}".format),
}
"""What is shown of a result of `myllm eval`; eval.json has more."""


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
    questions: dict[str, list[Result]] = {}
    newest = [_newest(run.results) for run in runs]
    for answers in newest:
        for name, result in answers.items():
            questions.setdefault(name, []).append(result)
    for name, results in questions.items():
        task, _, file = results[0].task.partition(":")
        title = f"{TITLES.get(task, task.capitalize())} {Path(file).name}".rstrip()
        hidden = "acc" if accuracy_key([result.metrics for result in results]) == "acc_norm" else "acc_norm"
        for key, (metric, write) in SHOWN.items():
            if key != hidden and any(key in result.metrics for result in results):
                heading = Cell(f"{title} {metric}", detail=f"myllm eval: {_settings(results[0])}")
                found = [by_name.get(name) for by_name in newest]
                yield heading, [_cell(row.metrics, key, write, row.step) if row else Cell("") for row in found]


def _newest(results: Sequence[Result]) -> dict[str, Result]:
    """The result of the latest checkpoint by question."""
    ordered = sorted(results, key=lambda result: -1 if result.step is None else result.step)
    return {repr((result.task, sorted(result.settings.items()), result.weights)): result for result in ordered}


def _settings(result: Result) -> str:
    """What decides the result beside the checkpoint, without digests."""
    settings = result.settings.items()
    words = [f"{name.replace('_', ' ')} {as_text(value)}" for name, value in settings if not name.endswith("_sha256")]
    return ", ".join([result.weights] if result.task == "summary" else [*words, result.weights])


def _cell(row: Row, key: str, write, step: int | None) -> Cell:
    value, error = as_float(row.get(key)), as_float(row.get(f"{key}_stderr"))
    if key == "acc_norm" and math.isnan(error):  # cloze, whose endings have equal lengths
        error = as_float(row.get("acc_stderr"))
    if not math.isfinite(value):
        return Cell("")
    details = [f"± {write(error)}" if error > 0 else "", f"step {step:,}" if step is not None else ""]
    return Cell(write(value), value, ", ".join(filter(None, details)))
