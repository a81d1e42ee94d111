"""Reads what a run writes about itself: metrics.jsonl, samples.jsonl, config.json, environment.json.

A file may be unfinished: training may be writing it, or may have died in the middle of a line.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from myllm import paths
from myllm.errors import UserError, did_you_mean
from myllm.files import read_json, read_rows
from myllm.migrations import CONFIG
from myllm.paths import user_path

Row = dict[str, Any]


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics.jsonl: sorted by step, each step once."""

    train: list[Row]
    evals: dict[str, list[Row]]
    """Rows by evaluation name."""
    skipped: int = 0
    """Number of unreadable lines."""
    overhead: dict[str, float] = field(default_factory=dict)
    """Seconds outside training steps by activity, summed over all starts of the run."""
    starts: list[int] = field(default_factory=list)
    """The first logged step of each start."""

    @property
    def last_step(self) -> int:
        return max(rows[-1]["step"] for rows in (self.train, *self.evals.values()) if rows)

    def last(self, name: str = "train") -> Row:
        """The newest row of training or of an evaluation; empty if there is none."""
        rows = self.rows(name)
        return rows[-1] if rows else {}

    def rows(self, name: str = "train") -> list[Row]:
        return self.train if name == "train" else self.evals.get(name, [])

    def up_to(self, step: int) -> "Metrics":
        """The rows of the first steps, without overhead."""
        evals = {name: [row for row in rows if row["step"] <= step] for name, rows in self.evals.items()}
        evals = {name: rows for name, rows in evals.items() if rows}
        return Metrics([row for row in self.train if row["step"] <= step], evals)

    def tokens_at(self, steps: np.ndarray | list[int]) -> np.ndarray:
        """Tokens seen after each of these steps, interpolated; NaN if no row has them.

        Shapes: (N,) -> (N,)
        """
        tokens = column(self.train, "tokens")
        known = np.isfinite(tokens)
        if not known.any():
            return np.full(len(steps), np.nan)
        known_steps = column(self.train, "step")[known]
        return np.interp(steps, np.append(0, known_steps), np.append(0, tokens[known]))

    def seconds_at(self, steps: np.ndarray) -> np.ndarray:
        """Seconds of training, without evaluations and checkpoints, up to these steps; NaN if unknown.

        Shapes: (N,) -> (N,)
        """
        seconds = self._training_s_by_row()
        if not np.isfinite(seconds).any():
            return np.full(len(steps), np.nan)
        return np.interp(steps, np.append(0, column(self.train, "step")), np.append(0, np.nancumsum(seconds)))

    def training_s(self) -> float:
        """Seconds in training steps, without evaluations and checkpoints; NaN if unknown."""
        seconds = self._training_s_by_row()
        return float(np.nansum(seconds)) if np.isfinite(seconds).any() else math.nan

    def time_by_activity(self) -> dict[str, float]:
        """Seconds of all starts by activity, the longest first; empty if unknown.

        Steps that were lost with a killed process do not count: a later start overwrote their rows.
        """
        training = self.training_s()
        if not self.overhead or math.isnan(training):
            return {}
        wait_fraction = np.clip(column(self.train, "data_wait_s") / column(self.train, "step_s"), 0, 1)
        waiting = float(np.nansum(wait_fraction * self._training_s_by_row()))
        seconds = Counter(self.overhead) + Counter({"training": training - waiting, "waiting for data": waiting})
        return dict(seconds.most_common())

    def _training_s_by_row(self) -> np.ndarray:
        """Training seconds since the previous row; NaN where unknown. Shapes: (len(self.train),)"""
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = np.diff(column(self.train, "tokens"), prepend=0) / column(self.train, "tokens_per_s")
        return np.where(np.isfinite(seconds), seconds, np.nan)


def find_run(run: str | Path) -> paths.RunPaths:
    """Find a run by its name under temp_data/runs or by its folder."""
    folder = user_path(run)
    if not (folder / "metrics.jsonl").is_file():
        return paths.RunPaths.of(str(run))
    paths.warn_if_ambiguous(str(run), folder, paths.runs_dir() / run)
    return paths.RunPaths(folder)


def read_metrics(path: Path) -> Metrics:
    """Read the training and evaluation rows of a metrics.jsonl.

    A run that returned to a checkpoint wrote some steps twice: the later rows count.

    Raises:
        UserError: the file is missing or has no rows.
    """
    rows, skipped = _read_lines(path)
    train: list[Row] = []
    evals: dict[str, list[Row]] = {}
    overhead: Counter[str] = Counter()
    starts: set[int] = set()
    for row in rows:
        match row:
            case {"kind": "train"}:
                _append_at_step(train, row)
            case {"kind": "eval", "name": name}:
                _append_at_step(evals.setdefault(str(name), []), row)
            case {"kind": "overhead" | "apart", "seconds": dict(seconds)}:  # "apart": its name in earlier versions
                overhead.update({str(activity): value for activity, value in seconds.items() if as_float(value) > 0})
                starts |= {row["step"]} if "starting" in seconds else set()
            case _:
                skipped += 1
    if not train and not evals:
        raise UserError(
            f"{path} has no training or evaluation row yet ({skipped} unreadable lines). "
            "Wait for the run's first logged step, then try again."
        )
    evals = {name: _of_newest_protocol(rows) for name, rows in evals.items()}
    return Metrics(train, evals, skipped, dict(overhead), sorted(starts))


def read_samples(path: Path) -> dict[str, list[Row]]:
    """Read samples by prompt, sorted by step; empty if the run has none."""
    by_prompt: dict[str, list[Row]] = {}
    if path.is_file():
        for row in _read_lines(path)[0]:
            if "prompt" in row and "text" in row:
                _append_at_step(by_prompt.setdefault(str(row["prompt"]), []), row)
    return by_prompt


def read_json_or_empty(path: Path) -> Row:
    """Read a JSON object such as environment.json; empty if the file is missing or incomplete."""
    try:
        return read_json(path)
    except (OSError, UserError):
        return {}


def read_config(path: Path) -> Row:
    """Read a run's config.json, migrated to today's names; empty if the file is missing or incomplete.

    Raises:
        UserError: a later version of MyLLM wrote it.
    """
    return CONFIG.upgrade(read_json_or_empty(path), path)


def section(config: Row, name: str) -> Row:
    """One group of settings; empty if it is missing or of another type."""
    settings = config.get(name)
    return settings if isinstance(settings, dict) else {}


def flatten(values: Row, prefix: str = "") -> Row:
    """Nested values by their full names: "train.max_steps"."""
    flat: Row = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def column(rows: list[Row], key: str) -> np.ndarray:
    """The values of `key` as float64, NaN where a row has no number. Shapes: (len(rows),)"""
    return np.array([as_float(row.get(key)) for row in rows], dtype=np.float64)


def get_text(row: Row, key: str) -> str | None:
    """The string at `key`; None if there is none."""
    value = row.get(key)
    return value if isinstance(value, str) else None


def as_float(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer with hundreds of digits
        return math.nan


def eval_protocol(row: Row) -> int:
    """The version of an evaluation: cloze draws its examples differently since protocol 2; older rows have none."""
    protocol = row.get("protocol")
    return protocol if isinstance(protocol, int) else 1


TASK_TITLES = {
    "hellaswag": "HellaSwag",
    "arc-easy": "ARC-easy",
    "arc-challenge": "ARC-challenge",
    "piqa": "PIQA",
    "openbookqa": "OpenBookQA",
    "winogrande": "WinoGrande",
    "lambada": "LAMBADA",
}
"""The public tasks, and the order in which reports show them."""


def chance_accuracy(name: str, row: Row) -> float | None:
    """The accuracy of random guessing; None where it is unknown, as in the first protocol of cloze."""
    if "chance" in row:
        return as_float(row["chance"])
    return 0.25 if name == "hellaswag" or (name == "cloze" and eval_protocol(row) > 1) else None


def _of_newest_protocol(rows: list[Row]) -> list[Row]:
    """Drop results of older protocols: a run that a newer version resumed has two curves that do not compare."""
    newest = max(map(eval_protocol, rows))
    return [row for row in rows if eval_protocol(row) == newest]


def accuracy_key(rows: list[Row]) -> str:
    """Which accuracy of a multiple-choice evaluation to show: normalized by length, as in papers, if it is known."""
    return "acc_norm" if np.isfinite(column(rows, "acc_norm")).any() else "acc"


class CenteredMean(NamedTuple):
    """The mean over tasks of (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect."""

    value: float
    stderr: float
    """From the tasks' standard errors. Runs that differ only in their seed vary by more than this."""
    tasks: list[str]


def centered_mean(rows: dict[str, Row]) -> CenteredMean | None:
    """One number for the public tasks, by their newest rows; None for fewer than two tasks.

    Source: CORE of DCLM (arXiv 2406.11794), which has other tasks, most with examples in the prompt.
    """
    centered, variances, tasks = [], [], []
    for name in TASK_TITLES:
        row = rows.get(name, {})
        key, chance = accuracy_key([row]), chance_accuracy(name, row)
        accuracy, error = as_float(row.get(key)), as_float(row.get(f"{key}_stderr"))
        if chance is not None and chance < 1 and math.isfinite(accuracy) and math.isfinite(error):
            centered.append((accuracy - chance) / (1 - chance))
            variances.append((error / (1 - chance)) ** 2)
            tasks.append(name)
    if len(tasks) < 2:
        return None
    return CenteredMean(sum(centered) / len(tasks), math.sqrt(sum(variances)) / len(tasks), tasks)


def moving_average(values: np.ndarray, half_window: float = 0.02) -> np.ndarray:
    """Moving average that ignores NaN and infinity.

    The window is centered. It is shorter near the first value, so that the steep start of a loss curve keeps its shape;
    at the end it only reaches back, so that the last value is not one noisy value.

    Args:
        values: (N,)
        half_window: as a fraction of N.
    """
    count = len(values)
    finite = np.isfinite(values)
    index = np.arange(count)
    half = np.minimum(max(2, round(count * half_window)), index // 4)
    first, end = index - half, np.minimum(index + half + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])


def _read_lines(path: Path) -> tuple[list[Row], int]:
    """The rows of a JSONL file that have a step, and the number of other lines."""
    if not path.is_file():
        raise UserError(_describe_missing(path))
    rows = list(read_rows(path))
    return [row for row in rows if row is not None], rows.count(None)


def _append_at_step(rows: list[Row], row: Row) -> None:
    """Append a row in place of those at its step and after it."""
    while rows and rows[-1]["step"] >= row["step"]:
        rows.pop()
    rows.append(row)


def _describe_missing(path: Path) -> str:
    run = path.parent
    if run.is_dir():
        return f"{run} has no {path.name}: training writes it at the first logged step. Start the run, or name another."
    known = sorted(file.parent.name for file in run.parent.glob("*/metrics.jsonl"))
    others = f"existing runs: {', '.join(known)}" if known else "no run has been started there yet"
    return f"there is no run folder {run}{did_you_mean(run.name, known)}; {others}."
