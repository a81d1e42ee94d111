"""The figures of a run: one function each, from the rows of metrics.jsonl.

A figure whose numbers are missing is not drawn. Figures are made without pyplot: no window, no global state, and
nothing to close afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from myllm.files import replacing
from myllm.formatting import format_number, format_percent, format_si
from myllm.runs.history import Metrics, Row, accuracy_key, as_float, chance_is_a_quarter, column, moving_average
from myllm.runs.reference_curve import reference_of

from . import axes as drawing
from .axes import BLUE, GREEN, GREY, INK, PURPLE, VERMILLION, points

DPI = 200  # twice what a figure's size in inches asks for on a screen


@dataclass(frozen=True)
class Plot:
    """How a figure is drawn: `draw` fills the axes, or returns False if the run has nothing to show there."""

    draw: Callable[[Axes, Metrics, Row], bool]
    description: str
    width: float = 4.7
    height: float = 3.3
    """Inches."""


def figure(name: str, metrics: Metrics, config: Row | None = None) -> Figure | None:
    """One figure of `PLOTS`, or None if the run has no numbers for it.

    Args:
        config: the run's config.json, where known; only for reference lines such as the gradient clip.
    """
    plot = PLOTS[name]
    with matplotlib.rc_context(drawing.STYLE):
        drawn = Figure(figsize=(plot.width, plot.height))
        return drawn if plot.draw(drawn.add_subplot(), metrics, config or {}) else None


def save_figures(metrics: Metrics, config: Row, folder: Path) -> dict[str, Path]:
    """Write every figure the run has numbers for as a PNG, and remove an older one it has none for any more."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in PLOTS:
        path = folder / f"{name}.png"
        drawn = figure(name, metrics, config)
        if drawn is None:
            path.unlink(missing_ok=True)
        else:
            with replacing(path, durable=False) as file:  # two reports may be drawn at once
                drawn.savefig(file, dpi=DPI, format="png")
            written[name] = path
    return written


def draw_loss(axes: Axes, metrics: Metrics, config: Row) -> bool:
    axes.set_title("Loss, nats per token")
    labels = drawing.draw_noisy_line(axes, metrics.train, "loss", BLUE, "train")
    labels += drawing.draw_marked_line(axes, metrics.rows("validation"), "loss", VERMILLION, "validation", "o")
    if not labels:
        return False
    labels += draw_reference_loss(axes, metrics, config)
    # A log axis keeps the last tenths of a nat, which took most of the time, from vanishing below the first steps.
    drawing.log_scale(axes, MaxNLocator(10, steps=[1, 2, 5, 10]))
    drawing.finish_axes(axes, metrics, labels)
    drawing.add_tokens_axis(axes, metrics)
    drawing.mark_non_finite(axes, metrics.train, "loss")
    return True


def draw_reference_loss(axes: Axes, metrics: Metrics, config: Row) -> list[drawing.Label]:
    """The published run's validation loss, dashed, in its band, for a run that repeats it; its points are marked."""
    reference = reference_of(config)
    if reference is None:
        return []
    curve = reference.curves["validation"]
    at = np.array(curve.tokens) / reference.batch_tokens  # steps of this run with as many tokens
    shown = np.array(curve.values)[at <= metrics.last_step]
    if not shown.size:
        return []
    steps = np.geomspace(at[0], min(at[-1], metrics.last_step), 200)
    values = np.array([curve.at(step * reference.batch_tokens) for step in steps])
    axes.fill_between(steps, values - curve.band, values + curve.band, color=INK, alpha=0.1, linewidth=0)
    axes.plot(steps, values, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.plot(at[: shown.size], shown, color=INK, linestyle="none", marker="D", markersize=3.5, clip_on=False, zorder=4)
    return [(values[-1], f"{reference.name}\n{format_number(values[-1])}", INK)]


def draw_reference_hellaswag(axes: Axes, config: Row) -> list[drawing.Label]:
    """The published run's HellaSwag, only known at its end: a line to reach."""
    reference = reference_of(config)
    if reference is None:
        return []
    curve = reference.curves["hellaswag"]
    (value,) = curve.values
    axes.axhspan(value - curve.band, value + curve.band, color=INK, alpha=0.1, linewidth=0)
    axes.axhline(value, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
    return [(value, f"{reference.name}\nat its end {100 * value:.2f} %", INK)]


def draw_perplexity(axes: Axes, metrics: Metrics, config: Row) -> bool:
    axes.set_title("Perplexity")
    # exp of the mean loss, not the mean of exp: that would follow the outliers.
    with np.errstate(over="ignore"):
        perplexity = np.exp(moving_average(column(metrics.train, "loss")))
    rows = [{"step": row["step"], "perplexity": value} for row, value in zip(metrics.train, perplexity, strict=True)]
    labels = drawing.draw_line(axes, rows, "perplexity", BLUE, "train")
    labels += drawing.draw_marked_line(
        axes, metrics.rows("validation"), "perplexity", VERMILLION, "validation", "o"
    )  # fmt: skip
    if labels:
        drawing.log_scale(axes)
        drawing.finish_axes(axes, metrics, labels)
    return bool(labels)


def draw_learning_rate(axes: Axes, metrics: Metrics, config: Row) -> bool:
    axes.set_title("Learning rate")
    labels = drawing.draw_line(axes, metrics.train, "lr", BLUE, "last")
    if labels:
        steps, rates = points(metrics.train, "lr")
        axes.fill_between(*drawing.thin(steps, rates), color=BLUE, alpha=0.08, linewidth=0)
        axes.set_ylim(0, (rates.max() or 1.0) * 1.1)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
        drawing.finish_axes(axes, metrics, labels)
    return bool(labels)


def draw_grad_norm(axes: Axes, metrics: Metrics, config: Row) -> bool:
    axes.set_title("Gradient norm, before clipping")
    labels = drawing.draw_noisy_line(axes, metrics.train, "grad_norm", BLUE, "norm")
    if not labels:
        return False
    optim = config.get("optim")
    clip = as_float(optim.get("max_grad_norm")) if isinstance(optim, dict) else 0.0
    if clip > 0:
        axes.axhline(clip, color=VERMILLION, linewidth=1.2, linestyle=(0, (4, 3)))
        labels.append((clip, f"clipped at\n{format_number(clip)}", VERMILLION))
    drawing.log_scale(axes)
    drawing.finish_axes(axes, metrics, labels)
    return True


def draw_throughput(axes: Axes, metrics: Metrics, config: Row) -> bool:
    axes.set_title("Tokens per second")
    labels = drawing.draw_noisy_line(axes, metrics.train, "tokens_per_s", BLUE, "tokens/s")
    if not labels:
        return False
    axes.set_ylim(0, (points(metrics.train, "tokens_per_s")[1].max() or 1.0) * 1.15)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_si(value)))
    steps, mfu = points(metrics.train, "mfu")
    if mfu.size:
        axes.set_title("Tokens per second, and MFU")
        # On one set of devices both are the same curve: another scale keeps one line from hiding the other.
        other = axes.twinx()
        other.plot(*drawing.thin(steps, moving_average(mfu)), color=GREEN, linestyle=(0, (4, 2)), linewidth=1.5)
        top = (mfu.max() or 1.0) * 1.7
        other.set_ylim(0, top)
        other.set_axis_off()
        axes.tick_params(left=False)  # twinx puts the ticks back
        labels.append((mfu[-1] / top * axes.get_ylim()[1], f"MFU\n{format_percent(moving_average(mfu)[-1])}", GREEN))
    drawing.finish_axes(axes, metrics, labels)
    return True


def draw_accuracy(axes: Axes, metrics: Metrics, config: Row) -> bool:
    axes.set_title("Accuracy")
    labels = drawing.draw_marked_line(
        axes, metrics.rows("validation"), "token_accuracy", VERMILLION, "next token", "o", format_percent
    )
    choices = []
    for name, title, colour, marker in (("cloze", "cloze", GREEN, "s"), ("hellaswag", "HellaSwag", PURPLE, "D")):
        rows = metrics.rows(name)
        choices += drawing.draw_marked_line(
            axes, rows, accuracy_key(rows), colour, title, marker, format_percent, error="acc_stderr"
        )  # fmt: skip
    if any(chance_is_a_quarter(name, metrics.last(name)) for name in ("cloze", "hellaswag") if metrics.rows(name)):
        axes.axhline(0.25, color=GREY, linewidth=1.2, linestyle=(0, (1, 2.5)))
        choices.append((0.25, "chance\n25 %", GREY))
    if metrics.rows("hellaswag"):
        choices += draw_reference_hellaswag(axes, config)
    if not labels + choices:
        return False
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    drawing.finish_axes(axes, metrics, labels + choices)
    return True


PLOTS: dict[str, Plot] = {
    "loss": Plot(draw_loss, "Training and validation loss by step", 10.4, 4.7),
    "loss_compact": Plot(draw_loss, "Training and validation loss by step, for narrow pages", height=3.9),
    "perplexity": Plot(draw_perplexity, "Training and validation perplexity by step"),
    "accuracy": Plot(draw_accuracy, "Accuracy by step: next token, cloze and HellaSwag where measured"),
    "grad_norm": Plot(draw_grad_norm, "Gradient norm before clipping by step"),
    "learning_rate": Plot(draw_learning_rate, "Learning rate by step"),
    "throughput": Plot(draw_throughput, "Tokens per second by step, and MFU where the device's peak is known"),
}
