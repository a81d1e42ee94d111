"""Runs side by side: summaries, evaluations, settings that differ, and samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from myllm.formatting import format_duration, format_percent, format_si
from myllm.runs.catalog import preset_of
from myllm.runs.eval_results import Result
from myllm.runs.history import Row, as_float, column, flatten, section
from myllm.runs.report.evaluations import error_text, eval_columns, newest_results, settings_text, shown_metrics
from myllm.runs.report.values import as_text, format_loss, shorten_sample

from .curves import ComparedRun

ENVIRONMENT = ("dataset", "device_name", "world_size", "precision", "git_commit", "versions.torch")
"""What is compared beside the config."""
PER_RUN = ("config.name", "config.version", "config.train.fresh")
"""Settings that differ between any two runs, or mean nothing afterwards."""


class Cell(NamedTuple):
    """A cell of a table, and the number by which it is sorted."""

    text: str
    number: float | None = None
    detail: str = ""
    """In small print below the text."""


class Table(NamedTuple):
    """A table that sorts itself by the heading that is clicked."""

    headings: list[Cell]
    rows: list[list[Cell]]


def summaries(runs: Sequence[ComparedRun]) -> Table:
    """One row for each run: how far it came, how fast, and on what."""
    titles = [
        "Run", "Preset", "Validation loss", "Lowest", "Training loss", "Step", "Tokens", "FLOPs", "Training time",
        "Tokens/s", "MFU", "Parameters", "Restarts", "Device",
    ]  # fmt: skip
    rows = []
    for run in runs:
        train, validation = run.metrics.last(), run.metrics.last("validation")
        losses = column(run.metrics.rows("validation"), "loss")
        lowest = float(np.nanmin(losses)) if np.isfinite(losses).any() else math.nan
        numbers = [
            (as_float(validation.get("loss")), format_loss),
            (lowest, format_loss),
            (as_float(train.get("loss")), format_loss),
            (float(run.metrics.last_step), "{:,.0f}".format),
            (as_float(train.get("tokens")), format_si),
            (run.flops, "{:.2e}".format),
            (run.metrics.training_s(), format_duration),
            (as_float(train.get("tokens_per_s")), format_si),
            (as_float(train.get("mfu")), format_percent),
            (as_float(run.environment.get("parameters")), format_si),
            (float(len(run.restarts)), "{:,.0f}".format),
        ]
        device = as_text(run.environment.get("device_name"))
        size = as_float(run.environment.get("world_size"))
        rows.append(
            [Cell(run.name), Cell(preset_of(run.environment) or "")]
            + [_number(value, write) for value, write in numbers]
            + [Cell(f"{size:.0f} x {device}" if size > 1 else device)]
        )
    return _without_empty_columns(Table([Cell(title) for title in titles], rows))


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
    for shown in {(c.name, c.key): c for run in runs for c in eval_columns(run.metrics)}.values():
        group = shown.group or group
        rows = [run.metrics.last(shown.name) for run in runs]
        cells = [_cell(row, shown.key, shown.format_value, row.get("step")) for row in rows]
        yield Cell(f"{group} {shown.title}", detail="in training"), cells


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


def differences(runs: Sequence[ComparedRun]) -> Table:
    """One row for each setting of the config, and each fact of the environment, that is not the same in all runs."""
    by_run = [_settings(run) for run in runs]
    names = sorted({name: None for settings in by_run for name in settings}, key=_setting_order)
    rows = []
    for name in names:
        values = [settings.get(name) for settings in by_run]
        if name not in PER_RUN and any(value != values[0] for value in values):
            cells = [Cell(as_text(value), value if _is_number(value) else None) for value in values]
            rows.append([Cell(name.removeprefix("config.")), *cells])
    return Table([Cell("Setting"), *(Cell(run.name) for run in runs)], rows)


def _settings(run: ComparedRun) -> dict[str, Any]:
    """All values by name, such as config.optim.max_lr."""
    environment = flatten(run.environment)
    known = {name: environment[name] for name in ENVIRONMENT if name in environment}
    if "git_commit" in known:
        known["git_commit"] = as_text(known["git_commit"])[:12]
    return {f"config.{name}": value for name, value in flatten(run.config).items()} | known


def _setting_order(name: str) -> tuple[bool, str]:
    return not name.startswith("config."), name


def samples(runs: Sequence[ComparedRun]) -> dict[str, list[Row | None]]:
    """For each prompt, each run's newest sample."""
    prompts = {prompt: None for run in runs for prompt in run.samples}
    found = {}
    for prompt in prompts:
        newest = [run.samples[prompt][-1] if run.samples.get(prompt) else None for run in runs]
        found[prompt] = [row and {"step": row["step"], "text": shorten_sample(row["text"])} for row in newest]
    return found


def warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """Why numbers of these runs may not compare."""
    tokenizers = {as_text(section(run.environment, "tokenizer").get("sha256")) for run in runs}
    datasets = {as_text(run.environment.get("dataset_hash")) for run in runs}
    lines = []
    if len(tokenizers) > 1:
        lines.append("The runs have different tokenizers: compare bits per byte, not losses per token.")
    if len(datasets) > 1:
        lines.append("The runs have different data sets, so their validation texts may differ.")
    steps = [run.metrics.last_step for run in runs]
    if min(steps) < max(steps):
        lines.append("The runs have different lengths: the tables show each at its own newest step.")
    return lines


def _number(value: float, write: Any) -> Cell:
    return Cell(write(value), value) if math.isfinite(value) else Cell("")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_empty_columns(table: Table) -> Table:
    kept = [index for index in range(len(table.headings)) if any(row[index].text for row in table.rows)]
    return Table([table.headings[index] for index in kept], [[row[index] for index in kept] for row in table.rows])
