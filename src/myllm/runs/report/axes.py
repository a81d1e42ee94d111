"""Lines, axes and labels that all figures of a run share."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from myllm.formatting import format_number, format_si
from myllm.runs.history import Metrics, Row, as_float, column, moving_average

# Blue, vermilion and green of Okabe and Ito (2008), https://jfly.uni-koeln.de/color, with a darker green, and a purple
# dark enough for text. Color-blind readers can tell them apart, and no series is identified by its color alone.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#00815d", "#aa3377"
INK, GRAY = "#1f2430", "#6b7280"
DASHED, DOTTED = (0, (4, 3)), (0, (1, 2.5))

MAX_POINTS = 2_000  # a line needs no more points than the picture has pixels


class Label(NamedTuple):
    """Text beside the end of a line, at its y value and in its color."""

    y: float
    text: str
    color: str


# -- lines ------------------------------------------------------------------------------------------------------------


def finite_points(rows: list[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows whose value is finite."""
    values = column(rows, key)
    finite = np.isfinite(values)
    return column(rows, "step")[finite], values[finite]


def downsample(steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keep about `max_points` points: the lowest and the highest of each bin, so that no spike is lost."""
    if len(steps) <= max_points:
        return steps, values
    kept = {0, len(steps) - 1}
    for indices in np.array_split(np.arange(len(steps)), max_points // 2):
        kept |= {indices[values[indices].argmin()], indices[values[indices].argmax()]}
    index = np.array(sorted(kept))
    return steps[index], values[index]


def plot_line(axes: Axes, rows: list[Row], key: str, name: str, color: str = BLUE, smooth: bool = False) -> list[Label]:
    """Plot one value of the training rows; with `smooth` its moving average, over the faint values themselves."""
    steps, values = finite_points(rows, key)
    if not steps.size:
        return []
    if smooth:
        axes.plot(*downsample(steps, values), color=color, alpha=0.28, linewidth=0.8)
        values = moving_average(values)
    axes.plot(*downsample(steps, values), color=color, marker="o" if steps.size == 1 else None)
    return [Label(values[-1], f"{name}\n{format_number(values[-1])}", color)]


def plot_evals(
    axes: Axes,
    rows: list[Row],
    key: str,
    name: str,
    color: str = VERMILION,
    marker: str = "o",
    format_value=format_number,
) -> list[Label]:
    """Plot an evaluation with markers, thinned out where there are too many to tell apart, and its standard errors."""
    steps, values = finite_points(rows, key)
    if not steps.size:
        return []
    stride = -(-steps.size // 60)
    if errors := dict(zip(*finite_points(rows, "acc_stderr"), strict=True)):
        heights = np.array([errors.get(step, 0.0) for step in steps])
        axes.errorbar(steps, values, heights, fmt="none", errorevery=stride, ecolor=color, alpha=0.45, capsize=2.5)
    axes.plot(steps, values, color=color, linewidth=1.2, alpha=0.7)
    axes.plot(
        steps[::stride], values[::stride], color=color, linestyle="none", marker=marker, markersize=5.5,
        markeredgecolor="white", markeredgewidth=0.9, clip_on=False, zorder=3,
    )  # fmt: skip
    return [Label(values[-1], f"{name}\n{format_value(values[-1])}", color)]


# -- axes -------------------------------------------------------------------------------------------------------------


def set_log_scale(axes: Axes, locator: Locator | None = None) -> None:
    """Make the y axis logarithmic, unless no line has a positive value.

    Args:
        locator: of the ticks. None: the fewer decades the lines span, the more ticks a decade.
    """
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[values > 0]
    if not values.size:
        return
    if locator is None:
        ratio = values.max() / values.min()
        locator = LogLocator(subs=(1, 2, 5) if ratio < 100 else (1, 3) if ratio < 1e5 else (1,), numticks=12)
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_minor_locator(NullLocator())
    set_ticks(axes.yaxis, locator, format_number)


def set_ticks(axis, locator: Locator | None, format_value) -> None:
    """Set where an axis has its ticks (None: where they are) and how their values are written."""
    if locator:
        axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))


def set_step_axis(axes: Axes, metrics: Metrics) -> None:
    axes.set_xlim(0, max(metrics.last_step, 1))
    axes.set_xlabel("step")
    set_ticks(axes.xaxis, MaxNLocator(6, integer=True), format_si)


def place_labels(axes: Axes, labels: list[Label]) -> None:
    """Write two-line labels right of the axes, as near to the ends of their lines as they fit without overlap."""
    font_size, figure = float(axes.xaxis.label.get_fontsize()), axes.get_figure()
    assert isinstance(figure, Figure)
    axes_height = figure.get_figheight() * 0.72 * 72  # in points, roughly
    gap = 2 * 1.3 * font_size / axes_height
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_axes.transform((0, label.y))[1]), label.text, label.color) for label in labels)
    heights = [min(max(height, gap / 2), 1.0) for height, _, _ in placed]  # above the numbers of the axis
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    if heights and heights[-1] > 1.0:  # pushed over the top: push back down
        heights[-1] = 1.0
        for index in reversed(range(len(heights) - 1)):
            heights[index] = min(heights[index], heights[index + 1] - gap)
    for height, (_, text, color) in zip(heights, placed, strict=True):
        axes.annotate(
            text, (1, height), xycoords="axes fraction", textcoords="offset points", xytext=(9, 0), color=color,
            va="center", fontweight="bold", fontsize=font_size - 0.5, linespacing=1.15,
        )  # fmt: skip


def add_token_axis(axes: Axes, metrics: Metrics) -> None:
    """Add an axis in tokens at the top, unless the batch size changed during the run."""
    steps, tokens = finite_points(metrics.train, "tokens")
    if not steps.size or steps[-1] <= 0 or tokens[-1] <= 0:
        return
    batch_tokens = tokens[-1] / steps[-1]
    if not np.allclose(tokens, steps * batch_tokens, rtol=0.01):
        return
    top = axes.secondary_xaxis("top", functions=(lambda step: step * batch_tokens, lambda token: token / batch_tokens))
    top.set_xlabel("tokens")
    set_ticks(top.xaxis, MaxNLocator(6), format_si)
    top.spines["top"].set_visible(False)
    top.tick_params(length=0)


def mark_non_finite_losses(axes: Axes, rows: list[Row]) -> None:
    """Mark the steps whose loss is NaN or infinite with crosses on the step axis."""
    steps = [row["step"] for row in rows if "loss" in row and not math.isfinite(as_float(row["loss"]))]
    if not steps:
        return
    axes.plot(
        steps, [0.02] * len(steps), "x", color=INK, markersize=5, markevery=-(-len(steps) // 200), clip_on=False,
        transform=axes.get_xaxis_transform(), zorder=4,
    )  # fmt: skip
    times = f"{len(steps)} times, first " if len(steps) > 1 else ""
    # A falling curve leaves this corner empty.
    axes.text(0.99, 0.97, f"x not finite {times}at step {steps[0]:,}", transform=axes.transAxes, ha="right", va="top")
