"""Lines, axes and labels that all figures of a run share."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from myllm.formatting import format_number, format_si
from myllm.runs.history import Metrics, Row, column, moving_average

# Blue, vermillion and green of Okabe and Ito (2008), https://jfly.uni-koeln.de/color, the green darkened, and a purple
# dark enough for text: distinct under the common colour blindnesses, and no series is told by its colour alone.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#00815d", "#aa3377"
INK, GREY, RULE, FAINT = "#1f2430", "#6b7280", "#c3c8d0", "#e5e7eb"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": RULE,
    "xtick.labelcolor": GREY,
    "ytick.color": GREY,
    "ytick.left": False,
    "ytick.right": False,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}

MAX_POINTS = 2_000  # a line has no use for more points than the picture has pixels

Label = tuple[float, str, str]
"""Where on the y axis, the text, its colour."""


# -- lines ------------------------------------------------------------------------------------------------------------


def points(rows: list[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows where the value is finite."""
    values = column(rows, key)
    finite = np.isfinite(values)
    return column(rows, "step")[finite], values[finite]


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about MAX_POINTS of the points: the lowest and highest of each stretch, so that no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    stretches = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    kept = {0, len(steps) - 1}
    for stretch in stretches:
        kept.update((stretch[values[stretch].argmin()], stretch[values[stretch].argmax()]))
    index = np.array(sorted(kept))
    return steps[index], values[index]


def draw_line(axes: Axes, rows: list[Row], key: str, colour: str, name: str) -> list[Label]:
    """One value as it is."""
    steps, values = points(rows, key)
    if not steps.size:
        return []
    axes.plot(*thin(steps, values), color=colour, marker="o" if steps.size == 1 else None)
    return [(values[-1], f"{name}\n{format_number(values[-1])}", colour)]


def draw_noisy_line(axes: Axes, rows: list[Row], key: str, colour: str, name: str) -> list[Label]:
    """One value as it is, faint, and its moving mean; the label is the mean's last."""
    steps, values = points(rows, key)
    if not steps.size:
        return []
    mean = moving_average(values)
    axes.plot(*thin(steps, values), color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(*thin(steps, mean), color=colour, marker="o" if steps.size == 1 else None)
    return [(mean[-1], f"{name}\n{format_number(mean[-1])}", colour)]


def draw_marked_line(
    axes: Axes,
    rows: list[Row],
    key: str,
    colour: str,
    name: str,
    marker: str,
    write=format_number,
    error: str | None = None,
) -> list[Label]:
    """Measurements far apart: every point has a marker, unless there are too many to tell apart."""
    steps, values = points(rows, key)
    if not steps.size:
        return []
    every = -(-steps.size // 60)
    if error and (bars := dict(zip(*points(rows, error), strict=True))):
        heights = np.array([bars.get(step, 0.0) for step in steps])
        axes.errorbar(steps, values, heights, fmt="none", errorevery=every, ecolor=colour, alpha=0.45, capsize=2.5)
    axes.plot(steps, values, color=colour, linewidth=1.2, alpha=0.7)
    axes.plot(
        steps[::every], values[::every], color=colour, linestyle="none", marker=marker, markersize=5.5,
        markeredgecolor="white", markeredgewidth=0.9, clip_on=False, zorder=3,
    )  # fmt: skip
    return [(values[-1], f"{name}\n{write(values[-1])}", colour)]


# -- axes -------------------------------------------------------------------------------------------------------------


def log_scale(axes: Axes, locator: Locator | None = None) -> None:
    """A logarithmic y axis for the lines drawn, or the plain one if none of them has a positive value.

    Args:
        locator: where the ticks are. None: the fewer decades the lines span, the more ticks in each.
    """
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[values > 0]
    if not values.size:
        return
    if locator is None:
        spread = values.max() / values.min()
        locator = LogLocator(subs=(1, 2, 5) if spread < 100 else (1, 3) if spread < 1e5 else (1,), numticks=12)
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def finish_axes(axes: Axes, metrics: Metrics, labels: list[Label]) -> None:
    """The step axis, and the labels at the lines' ends."""
    axes.set_xlim(0, max(metrics.last_step, 1))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_si(value)))
    place_labels(axes, labels)


def place_labels(axes: Axes, labels: list[Label]) -> None:
    """Two-line labels right of the axes, each as near to its line's end as the others leave room."""
    height = axes.get_figure().get_figheight() * 0.72 * 72  # the axes' own, about, in points
    gap = 2 * 1.3 * font_size(axes) / height
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = [(float(to_axes.transform((0, value))[1]), text, colour) for value, text, colour in labels]
    placed.sort()
    heights = [min(max(height, 0.0), 1.0) for height, _, _ in placed]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    if heights and heights[-1] > 1.0:  # pushed over the top: push back down
        heights[-1] = 1.0
        for index in reversed(range(len(heights) - 1)):
            heights[index] = min(heights[index], heights[index + 1] - gap)
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        axes.annotate(
            text, (1, height), xycoords="axes fraction", textcoords="offset points", xytext=(9, 0), color=colour,
            va="center", fontweight="bold", fontsize=font_size(axes) - 0.5, linespacing=1.15,
        )  # fmt: skip


def font_size(axes: Axes) -> float:
    return axes.xaxis.label.get_fontsize()


def add_tokens_axis(axes: Axes, metrics: Metrics) -> None:
    """A second step axis on top, in tokens; left out if the tokens a step changed on the way."""
    steps, tokens = points(metrics.train, "tokens")
    if not steps.size or steps[-1] <= 0 or tokens[-1] <= 0:
        return
    rate = tokens[-1] / steps[-1]
    if not np.allclose(tokens, steps * rate, rtol=0.01):
        return
    top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda tokens: tokens / rate))
    top.set_xlabel("tokens")
    top.xaxis.set_major_locator(MaxNLocator(6))
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_si(value)))
    top.spines["top"].set_visible(False)
    top.tick_params(length=0)


def mark_non_finite(axes: Axes, rows: list[Row], key: str) -> None:
    """Crosses on the step axis where the value was NaN or infinite."""
    suspects = np.flatnonzero(~np.isfinite(column(rows, key)))
    bad = [rows[index]["step"] for index in suspects if key in rows[index]]
    if not bad:
        return
    ground = axes.get_xaxis_transform()
    axes.plot(
        bad, [0.02] * len(bad), "x", color=INK, markersize=5, markevery=-(-len(bad) // 200), transform=ground, zorder=4,
        clip_on=False,
    )  # fmt: skip
    times = f"{len(bad)} times, first " if len(bad) > 1 else ""
    # In the corner that a falling curve leaves empty.
    axes.text(0.99, 0.97, f"x not finite {times}at step {bad[0]:,}", transform=axes.transAxes, ha="right", va="top")
