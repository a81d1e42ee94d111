"""What pages show of evaluations: those of training, by step, and those that `myllm eval` added to eval.json."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from myllm.errors import UserError, warn
from myllm.formatting import format_number, format_percent, format_si
from myllm.runs import eval_results
from myllm.runs.eval_results import Result
from myllm.runs.history import TASK_TITLES, Metrics, Row, accuracy_key, as_float

from .values import as_text, format_loss, format_perplexity, value_text

MAX_TABLE_ROWS = 25
RESULT_TITLES = {"perplexity": "Text", "summary": "Public tasks"} | TASK_TITLES
RESULT_METRICS = {
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

# -- in training ------------------------------------------------------------------------------------------------------


class EvalColumn(NamedTuple):
    """One number of one evaluation."""

    group: str
    title: str
    name: str
    """Of the evaluation."""
    key: str
    """Of the number in its rows."""
    format_value: Callable[[float], str]


def eval_columns(metrics: Metrics) -> list[EvalColumn]:
    """What a table shows of the evaluations that a run has."""
    columns = [
        EvalColumn("Validation", "loss", "validation", "loss", format_loss),
        EvalColumn("", "perplexity", "validation", "perplexity", format_perplexity),
        EvalColumn("", "bits per byte", "validation", "bits_per_byte", format_loss),
        EvalColumn("", "token accuracy", "validation", "token_accuracy", format_percent),
        *_component_columns(metrics),
        *(
            EvalColumn(title, "accuracy", name, accuracy_key(metrics.rows(name)), format_percent)
            for name, title in {"cloze": "Cloze", **TASK_TITLES}.items()
        ),
    ]
    return [column for column in columns if metrics.rows(column.name)]


def eval_table(metrics: Metrics) -> dict[str, Any]:
    """Columns and rows of the table of evaluations, with at most MAX_TABLE_ROWS of the evaluated steps."""
    columns = eval_columns(metrics)
    by_step = {name: {row["step"]: row for row in metrics.rows(name)} for _, _, name, _, _ in columns}
    steps = sorted(set().union(*by_step.values()))
    shown = steps
    if len(steps) > MAX_TABLE_ROWS:
        shown = [steps[index] for index in np.linspace(0, len(steps) - 1, MAX_TABLE_ROWS).round().astype(int)]
    rows = [
        [f"{step:,}", format_si(tokens) if tokens >= 0 else ""]
        + [value_text(by_step[name].get(step, {}), key, format_value) for _, _, name, key, format_value in columns]
        for step, tokens in zip(shown, metrics.tokens_at(shown), strict=True)
    ]
    return {"headings": [column[:2] for column in columns], "rows": rows, "n_steps": len(steps)}


def _component_columns(metrics: Metrics) -> list[EvalColumn]:
    """Columns for each text that was evaluated by itself, such as the components of a mixture."""
    return [
        EvalColumn(name if key == "loss" else "", key, name, key, format_value)
        for name in metrics.evals
        if name.startswith("validation/")
        for key, format_value in (("loss", format_loss), ("epochs", format_number))
        if key in metrics.last(name)
    ]


# -- by `myllm eval` --------------------------------------------------------------------------------------------------


class ShownMetric(NamedTuple):
    """One number of a result."""

    key: str
    title: str
    """Of the task and the number, such as HellaSwag accuracy."""
    format_value: Callable[[float], str]


def read_results(file: Path) -> list[Result]:
    """The results in a run's eval.json; none, with a warning, if this version cannot read it."""
    try:
        return eval_results.read(file)
    except UserError:
        warn(f"{file} is not a file of `myllm eval` that this version reads: its results are left out")
        return []


def newest_results(results: Sequence[Result]) -> dict[str, Result]:
    """The result of the latest checkpoint by question: task, settings and kind of weights."""
    ordered = sorted(results, key=lambda result: -1 if result.step is None else result.step)
    return {repr((result.task, sorted(result.settings.items()), result.weights)): result for result in ordered}


def shown_metrics(result: Result) -> list[ShownMetric]:
    task, _, file = result.task.partition(":")
    title = f"{RESULT_TITLES.get(task, task.capitalize())} {Path(file).name}".rstrip()
    hidden = "acc" if accuracy_key([result.metrics]) == "acc_norm" else "acc_norm"
    shown = {key: value for key, value in RESULT_METRICS.items() if key in result.metrics and key != hidden}
    return [ShownMetric(key, f"{title} {name}", write) for key, (name, write) in shown.items()]


def settings_text(result: Result) -> str:
    """What decides the result beside the checkpoint, without digests."""
    settings = result.settings.items()
    words = [f"{name.replace('_', ' ')} {as_text(value)}" for name, value in settings if not name.endswith("_sha256")]
    return ", ".join([result.weights] if result.task == "summary" else [*words, result.weights])


def error_text(row: Row, key: str, format_value: Callable[[float], str]) -> str:
    """The standard error of a number; empty if it is not known."""
    error = as_float(row.get(f"{key}_stderr"))
    if key == "acc_norm" and math.isnan(error):  # cloze, whose endings have equal lengths
        error = as_float(row.get("acc_stderr"))
    return f"± {format_value(error)}" if error > 0 else ""


def result_rows(results: Sequence[Result]) -> list[list[str]]:
    """A table of eval.json: what, value, error, step and settings."""
    return [
        [
            metric.title,
            value_text(result.metrics, metric.key, metric.format_value),
            error_text(result.metrics, metric.key, metric.format_value),
            "" if result.step is None else f"{result.step:,}",
            settings_text(result),
        ]
        for result in newest_results(results).values()
        for metric in shown_metrics(result)
    ]
