"""The curves of several runs, as numbers that charts.js draws over each other."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from myllm.config import saved_config, to_dict
from myllm.errors import UserError
from myllm.paths import RunPaths
from myllm.planning.flops import flops_per_token
from myllm.runs.eval_results import Result
from myllm.runs.history import (
    TASK_TITLES,
    Metrics,
    Row,
    accuracy_key,
    as_float,
    moving_average,
    read_config,
    read_json_or_empty,
    read_metrics,
    read_samples,
    section,
)
from myllm.runs.report.axes import downsample, finite_points
from myllm.runs.report.evaluations import read_results

MAX_POINTS = 600
"""Of a curve: more than a phone has pixels."""


@dataclass(frozen=True)
class ComparedRun:
    """What one run has recorded."""

    name: str
    metrics: Metrics
    config: Row
    """With the values of settings that its version did not have."""
    environment: Row
    samples: dict[str, list[Row]]
    flops_per_token: float
    """NaN if its model is not known."""
    results: list[Result]
    """Of `myllm eval`."""

    @property
    def restarts(self) -> list[int]:
        """The first logged steps after each restart."""
        return self.metrics.starts[1:]

    @property
    def flops(self) -> float:
        """Of the training so far."""
        return as_float(self.metrics.last().get("tokens")) * self.flops_per_token


def read_run(run: RunPaths) -> ComparedRun:
    """
    Raises:
        UserError: the run has no rows yet, or a later version wrote it.
    """
    metrics, config = read_metrics(run.metrics), read_config(run.config)
    flops = math.nan
    if section(config, "model"):
        with suppress(UserError):  # a key of a later version
            complete = saved_config(config, run.config)
            config, flops = json.loads(json.dumps(to_dict(complete))), flops_per_token(complete.model)
    environment = read_json_or_empty(run.environment)
    samples, results = read_samples(run.samples), read_results(run.evals)
    return ComparedRun(run.root.name, metrics, config, environment, samples, flops, results)


class Chart(NamedTuple):
    """One value of all runs."""

    title: str
    name: str
    """Of the evaluation; or train."""
    key: str | None = None
    """Of the value. None: that of the run's accuracy."""
    unit: str = "number"
    """How charts.js writes it: loss, number or percent."""
    is_log: bool = False
    smooth: bool = False
    """Draw its moving average."""


CHARTS = (
    Chart("Validation loss, nats per token", "validation", "loss", "loss", is_log=True),
    Chart("Training loss, nats per token", "train", "loss", "loss", is_log=True, smooth=True),
    Chart("Validation bits per byte", "validation", "bits_per_byte", "loss", is_log=True),
    *(Chart(f"{title} accuracy", name, unit="percent") for name, title in {"cloze": "Cloze", **TASK_TITLES}.items()),
    Chart("Learning rate", "train", "lr"),
    Chart("Learning rate of Muon", "train", "muon_lr"),
    Chart("Gradient norm, before clipping", "train", "grad_norm", is_log=True, smooth=True),
    Chart("Tokens per second", "train", "tokens_per_s", smooth=True),
)
"""In the order of the page."""


def chart_data(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """What charts.js draws: names, restarts and curves of all runs. Charts without a curve are left out."""
    drawn = []
    for chart in CHARTS:
        curves = [_curve(run, chart) for run in runs]
        if any(curve is not None for curve in curves):
            has_dots = chart.name != "train"
            drawn.append(
                {"title": chart.title, "unit": chart.unit, "log": chart.is_log, "dots": has_dots, "curves": curves}
            )
    return {
        "runs": [{"name": run.name, "restarts": _positions(run, np.array(run.restarts, float))} for run in runs],
        "charts": drawn,
    }


def _curve(run: ComparedRun, chart: Chart) -> dict[str, list[float]] | None:
    """Positions on each axis, and values; None if the run has none."""
    rows = run.metrics.rows(chart.name)
    steps, values = finite_points(rows, chart.key or accuracy_key(rows))
    if not steps.size:
        return None
    if chart.smooth:
        values = moving_average(values)
    steps, values = downsample(steps, values, MAX_POINTS)
    return {**_positions(run, steps), "value": _rounded(values)}


def _positions(run: ComparedRun, steps: np.ndarray) -> dict[str, list[float]]:
    """These steps on each axis; an axis that the run does not know has no entry."""
    tokens = run.metrics.tokens_at(steps)
    positions = {
        "step": steps,
        "tokens": tokens,
        "hours": run.metrics.seconds_at(steps) / 3_600,
        "flops": tokens * run.flops_per_token,
    }
    return {axis: _rounded(values) for axis, values in positions.items() if np.isfinite(values).all()}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
