"""What a run wrote about itself, read back: metrics.jsonl, samples.jsonl, config.json, environment.json.

Readers never trust a file to be finished: training may be writing it, or may have died in the middle of a line.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from myllm import paths
from myllm.errors import UserError, nearest
from myllm.files import read_json, run_rows
from myllm.migrations import CONFIG
from myllm.paths import user_path

Row = dict[str, Any]


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics.jsonl, in order of step and each step once."""

    train: list[Row]
    evals: dict[str, list[Row]]
    """Rows by the eval's name, in order of step."""
    skipped: int = 0
    """Lines that could not be read."""
    apart: dict[str, float] = field(default_factory=dict)
    """Seconds of what is no part of a step, by its name; of all starts of the run together."""

    @property
    def last_step(self) -> int:
        return max(rows[-1]["step"] for rows in (self.train, *self.evals.values()) if rows)

    def last(self, name: str = "train") -> Row:
        """The newest row of an eval, or of training; empty if there is none."""
        rows = self.rows(name)
        return rows[-1] if rows else {}

    def rows(self, name: str = "train") -> list[Row]:
        return self.train if name == "train" else self.evals.get(name, [])

    def tokens_at(self, steps: np.ndarray | list[int]) -> np.ndarray:
        """Tokens seen after that many steps each; NaN if no row says.

        Shapes: (N,) -> (N,)
        """
        tokens = column(self.train, "tokens")
        known = np.isfinite(tokens)
        if not known.any():
            return np.full(len(steps), np.nan)
        known_steps = column(self.train, "step")[known]
        return np.interp(steps, np.append(0, known_steps), np.append(0, tokens[known]))

    def training_s(self) -> float:
        """Seconds of training, evaluations and checkpoints not counted; NaN if no row says."""
        seconds = self._training_s()
        return float(np.nansum(seconds)) if np.isfinite(seconds).any() else math.nan

    def seconds(self) -> dict[str, float]:
        """Where the time of all starts went, longest first; empty if no row says.

        What was trained after the newest checkpoint and was lost with a process is not in it: its rows are gone.
        """
        if not self.apart or math.isnan(training := self.training_s()):
            return {}
        waited = np.clip(column(self.train, "data_wait_s") / column(self.train, "step_s"), 0, 1) * self._training_s()
        waited = float(np.nansum(waited))
        seconds = Counter(self.apart) + Counter({"training": training - waited, "waiting for data": waited})
        return dict(seconds.most_common())

    def _training_s(self) -> np.ndarray:
        """By training row, since the one before: (N,), NaN where a row does not say."""
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = np.diff(column(self.train, "tokens"), prepend=0) / column(self.train, "tokens_per_s")
        return np.where(np.isfinite(seconds), seconds, np.nan)


def find_run(run: str | Path) -> paths.RunPaths:
    """The run of that name under temp_data/runs, or the run in that folder."""
    folder = user_path(run)
    if not (folder / "metrics.jsonl").is_file():
        return paths.RunPaths.of(str(run))
    paths.warn_of_two(str(run), folder, paths.runs() / run)
    return paths.RunPaths(folder)


def read_metrics(path: Path) -> Metrics:
    """Every training and evaluation row of a metrics.jsonl.

    A run that went back to a checkpoint wrote some steps twice: what it wrote last is what happened.

    Raises:
        UserError: if there is no such file, or no row in it.
    """
    rows, skipped = _read_lines(path)
    train: list[Row] = []
    evals: dict[str, list[Row]] = {}
    apart: Counter[str] = Counter()
    for row in rows:
        if row.get("kind") == "train":
            _append_at_step(train, row)
        elif row.get("kind") == "eval" and "name" in row:
            _append_at_step(evals.setdefault(str(row["name"]), []), row)
        elif row.get("kind") == "apart" and isinstance(row.get("seconds"), dict):
            apart.update({str(name): each for name, each in row["seconds"].items() if as_float(each) > 0})
        else:
            skipped += 1
    if not train and not evals:
        raise UserError(
            f"{path} holds no training or evaluation row yet ({skipped} unreadable lines). "
            "Wait for the run's first logged step, then try again."
        )
    evals = {name: _of_newest_protocol(rows) for name, rows in evals.items()}
    return Metrics(train, evals, skipped, dict(apart))


def read_samples(path: Path) -> dict[str, list[Row]]:
    """Samples by prompt, in order of step; empty if the run wrote none."""
    by_prompt: dict[str, list[Row]] = {}
    if path.is_file():
        for row in _read_lines(path)[0]:
            if "prompt" in row and "text" in row:
                _append_at_step(by_prompt.setdefault(str(row["prompt"]), []), row)
    return by_prompt


def read_json_or_empty(path: Path) -> Row:
    """A JSON object such as config.json; empty if it is missing or half written."""
    try:
        return read_json(path)
    except (OSError, UserError):
        return {}


def read_config(path: Path) -> Row:
    """A run's config.json, by today's names; empty if it is missing or half written.

    Raises:
        UserError: a later version of this program wrote it.
    """
    return CONFIG.upgrade(read_json_or_empty(path), path)


def column(rows: list[Row], key: str) -> np.ndarray:
    """One column as float64: NaN where a row has no number there.

    Shapes: (len(rows),)
    """
    values = [row.get(key) for row in rows]
    try:
        return np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        return np.array([as_float(value) for value in values], dtype=np.float64)


def get_text(row: Row, key: str) -> str | None:
    """A text in a row; None where there is none."""
    value = row.get(key)
    return value if isinstance(value, str) else None


def as_float(value: Any) -> float:
    """A JSON number as a float, anything else as NaN."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def eval_protocol(row: Row) -> int:
    """How an evaluation was done: cloze's examples have been drawn in two ways, and only the newer says so."""
    found = row.get("protocol")
    return found if isinstance(found, int) else 1


def chance_is_a_quarter(name: str, row: Row) -> bool:
    """Whether a model that knows nothing is right in one of four cases: not so in the first protocol of cloze."""
    return name == "hellaswag" or (name == "cloze" and eval_protocol(row) > 1)


def _of_newest_protocol(rows: list[Row]) -> list[Row]:
    """Figures of a run that was taken up by a newer version are not drawn as one curve."""
    newest = max(map(eval_protocol, rows))
    return [row for row in rows if eval_protocol(row) == newest]


def accuracy_key(rows: list[Row]) -> str:
    """The accuracy to show of a multiple-choice eval: normalized by length, as published figures are, where known."""
    return "acc_norm" if np.isfinite(column(rows, "acc_norm")).any() else "acc"


def moving_average(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """A moving mean that ignores what is not finite.

    The window is centred and grows with the distance from the first value, so that the steep beginning of a loss curve
    stays where it is; at the end it reaches back only, so that the last value is not a single noisy one.

    Args:
        values: (N,), in order of time.
        share: half the window, as a share of N.
    """
    count = len(values)
    finite = np.isfinite(values)
    index = np.arange(count)
    half = np.minimum(max(2, round(count * share)), index // 4)
    first, end = index - half, np.minimum(index + half + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])


def _read_lines(path: Path) -> tuple[list[Row], int]:
    """The rows of a JSONL file that have a step, and how many lines were no such row."""
    if not path.is_file():
        raise UserError(_missing(path))
    rows = list(run_rows(path))
    return [row for row in rows if row is not None], rows.count(None)


def _append_at_step(rows: list[Row], row: Row) -> None:
    while rows and rows[-1]["step"] >= row["step"]:
        rows.pop()
    rows.append(row)


def _missing(path: Path) -> str:
    run = path.parent
    if run.is_dir():
        return f"{run} has no {path.name}: training writes it at its first logged step. Start the run, or name another."
    known = sorted(file.parent.name for file in run.parent.glob("*/metrics.jsonl"))
    others = f"runs there: {', '.join(known)}" if known else "no run has been started there yet"
    return f"there is no run folder {run}{nearest(run.name, known)}; {others}."
