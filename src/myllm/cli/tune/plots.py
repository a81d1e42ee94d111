"""The figures of a search: the loss against each setting, and the range test."""

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from myllm.formatting import format_number
from myllm.runs.report.axes import BLUE, DASHED, GRAY, GREEN, INK, VERMILION, set_ticks
from myllm.runs.report.plots import styled_figure

from .fit import Parabola
from .search import TunedRun
from .space import Parameter

if TYPE_CHECKING:
    from .range_test import RangeTest

RUNG_STYLES = (("D/9", BLUE, 30), ("D/3", GREEN, 62), ("D", VERMILION, 110))
"""Name, color and area of the points of each rung."""
WIDTH, HEIGHT = 5.6, 3.8
SHOWN = 0.75
"""The loss axis reaches to this quantile of the runs, and a third further."""


def draw_setting(parameter: Parameter, runs: list[TunedRun], parabola: Parabola | None) -> Figure:
    """Loss against one setting, above the best run of the same length and seed: so all share an axis.

    Runs that diverged are crosses at the top.
    """
    best: dict[tuple[int, int], float] = defaultdict(lambda: math.inf)
    for run in runs:
        best[run.group] = min(best[run.group], run.loss)
    gaps = [run.loss - best[run.group] for run in runs if math.isfinite(run.loss)]
    top = 4 / 3 * max(float(np.quantile(gaps, SHOWN)), 0.01) if gaps else 1.0
    with styled_figure(WIDTH, HEIGHT) as (figure, (axes,)):
        axes.set_title(f"optim.{parameter.name}")
        for run in runs:
            _, color, area = RUNG_STYLES[run.rung]
            x, gap = parameter.coordinate(run.values[parameter.name]), run.loss - best[run.group]
            edge = INK if run.number == 0 else "white"
            if not math.isfinite(run.loss):
                axes.plot(x, top, "x", color=color, clip_on=False, zorder=4)
            elif gap > top:
                axes.scatter(x, top, s=area, color=color, edgecolor=edge, marker="^", clip_on=False, zorder=3)
            else:
                axes.scatter(x, gap, s=area, color=color, edgecolor=edge, clip_on=False, zorder=3)
        if parabola and parabola.optimum is not None:
            _draw_parabola(axes, parameter, parabola, top)
        _finish(axes, parameter, top)
        return figure


def _draw_parabola(axes: Axes, parameter: Parameter, parabola: Parabola, top: float) -> None:
    x = np.linspace(*parameter.bounds, 200)
    y = parabola.curvature * (x - parabola.center) ** 2
    axes.plot(x[y <= top], y[y <= top], color=INK, linewidth=1.2, linestyle=DASHED, zorder=2)
    low, high = sorted(map(parameter.coordinate, (parabola.low, parabola.high)))
    axes.axvspan(low, high, color=GRAY, alpha=0.15, linewidth=0)
    axes.axvline(parabola.center, color=GRAY, linewidth=1)


def _finish(axes: Axes, parameter: Parameter, top: float) -> None:
    """Scales, labels and legend."""
    axes.set_ylim(0, top)
    axes.set_ylabel("nats above the best of its kind")
    margin = 0.03 * (parameter.bounds[1] - parameter.bounds[0])
    axes.set_xlim(parameter.bounds[0] - margin, parameter.bounds[1] + margin)
    if parameter.is_log:
        ticks = np.linspace(*parameter.bounds, 5)
        axes.set_xticks(ticks)
        set_ticks(axes.xaxis, None, lambda x: format_number(float(f"{parameter.value_at(x):.3g}")))
    else:
        set_ticks(axes.xaxis, MaxNLocator(5), format_number)
    axes.set_xlabel(f"value in a run of D tokens{', log scale' if parameter.is_log else ''}")
    styles = [*((name, color, area**0.5, "white") for name, color, area in RUNG_STYLES), ("preset", "white", 7.0, INK)]
    keys = [
        Line2D([], [], color=color, marker="o", linestyle="none", markersize=size, markeredgecolor=edge, label=name)
        for name, color, size, edge in styles
    ]
    axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=4, frameon=False)


def draw_range_test(test: "RangeTest") -> Figure:
    """The loss against the rising rate."""
    with styled_figure(WIDTH, HEIGHT) as (figure, (axes,)):
        axes.set_title("Range test")
        axes.plot(test.rates, test.losses, color=BLUE, alpha=0.28, linewidth=0.8)
        axes.plot(test.rates, test.smooth, color=BLUE)
        for rate, text in ((test.steepest, "steepest"), (test.guess, "a third")):
            axes.axvline(rate, color=GRAY, linestyle=DASHED, linewidth=1)
            axes.annotate(
                f" {text} {rate:.2g}", (rate, 1), xycoords=axes.get_xaxis_transform(), va="top", rotation=90,
                ha="right", fontsize=8.5,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("optim.max_lr, rising")
        axes.set_ylabel("training loss, nats")
        return figure
