"""The figures of a run, one function each, drawn from the rows of metrics.jsonl.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from myllm.formatting import format_number, format_percent, format_si
from myllm.runs.history import (
    Metrics,
    Row,
    accuracy_key,
    as_float,
    chance_accuracy,
    column,
    moving_average,
    section,
)
from myllm.runs.reference_curve import find_reference

from .axes import (
    BLUE,
    DASHED,
    DOTTED,
    GRAY,
    GREEN,
    INK,
    PURPLE,
    VERMILION,
    Label,
    add_token_axis,
    downsample,
    finite_points,
    mark_non_finite_losses,
    place_labels,
    plot_evals,
    plot_line,
    set_log_scale,
    set_step_axis,
    set_ticks,
)
from .page import save_figure

NAMED_STYLES = ((GREEN, "s"), (PURPLE, "D"), (GRAY, "^"), (INK, "v"))
"""Of the first few further validation sets, or components of a mixture."""
STYLE_FILE = Path(__file__).with_name("plots.mplstyle")


@dataclass(frozen=True)
class Plot:
    """How a figure is drawn."""

    draw: Callable[[Axes, Metrics, Row], list[Label]]
    """Draws on empty axes from metrics and config.json; no labels mean that the run has no numbers for it."""
    title: str
    description: str
    width: float = 4.7
    height: float = 3.3
    """Inches."""


def figure(name: str, metrics: Metrics, config: Row | None = None) -> Figure | None:
    """Draw one figure of `PLOTS`; None if the run has no numbers for it.

    Args:
        config: the run's config.json, for reference lines such as the clipping norm.
    """
    plot = PLOTS[name]
    with styled_figure(plot.width, plot.height) as (drawn, (axes,)):
        axes.set_title(plot.title)
        if labels := plot.draw(axes, metrics, config or {}):
            set_step_axis(axes, metrics)
            place_labels(axes, labels)
            return drawn
    return None


@contextmanager
def styled_figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of this size, in inches, and its axes side by side; they have the looks of the reports."""
    with matplotlib.rc_context(fname=STYLE_FILE):
        drawn = Figure(figsize=(width, height))
        yield drawn, list(drawn.subplots(1, columns, squeeze=False)[0])


def save_figures(metrics: Metrics, config: Row, folder: Path) -> dict[str, Path]:
    """Write every figure that the run has numbers for as a PNG file, and delete older files of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {}
    for name in PLOTS:
        path = folder / f"{name}.png"
        drawn = figure(name, metrics, config)
        if drawn is None:
            path.unlink(missing_ok=True)
        else:
            save_figure(drawn, path)
            saved[name] = path
    return saved


def draw_loss(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    labels = plot_line(axes, metrics.train, "loss", "train", smooth=True)
    labels += plot_evals(axes, metrics.rows("validation"), "loss", "validation")
    named = [name for name in metrics.evals if name.startswith("validation/")]
    for name, (color, marker) in zip(named, NAMED_STYLES, strict=False):
        labels += plot_evals(axes, metrics.rows(name), "loss", name.removeprefix("validation/"), color, marker)
    if labels:
        labels += _draw_reference_loss(axes, metrics, config)
        # On a linear axis the last tenths of a nat, which take most of the time, would vanish below the first steps.
        set_log_scale(axes, MaxNLocator(10, steps=[1, 2, 5, 10]))
        add_token_axis(axes, metrics)
        mark_non_finite_losses(axes, metrics.train)
    return labels


def _draw_reference_loss(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    """The validation loss of the published run that this run repeats, if any: dashed, with its band and points."""
    reference = find_reference(config)
    if reference is None:
        return []
    curve = reference.curves["validation"]
    curve_steps = np.array(curve.tokens) / reference.batch_tokens  # steps of this run with as many tokens
    reached = curve_steps <= metrics.last_step
    if not reached.any():
        return []
    steps = np.geomspace(curve_steps[0], min(curve_steps[-1], metrics.last_step), 200)
    values = np.array([curve.at(step * reference.batch_tokens) for step in steps])
    axes.fill_between(steps, values - curve.band, values + curve.band, color=INK, alpha=0.1, linewidth=0)
    axes.plot(steps, values, color=INK, linewidth=1.1, linestyle=DASHED)
    axes.plot(
        curve_steps[reached], np.array(curve.values)[reached], color=INK, linestyle="none", marker="D", markersize=3.5,
        clip_on=False, zorder=4,
    )  # fmt: skip
    return [Label(values[-1], f"{reference.name}\n{format_number(values[-1])}", INK)]


def draw_components(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    styles, labels = (*NAMED_STYLES, (BLUE, ""), (VERMILION, "")), list[Label]()
    keys = dict.fromkeys(key for row in metrics.train for key in row if key.startswith("loss/"))
    for key, (color, _) in zip(keys, styles, strict=False):
        labels += plot_line(axes, metrics.train, key, key.removeprefix("loss/"), color, smooth=True)
    if labels:
        set_log_scale(axes)
    return labels


def draw_perplexity(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    # exp of the mean loss: outliers would dominate the mean of exp.
    with np.errstate(over="ignore"):
        perplexity = np.exp(moving_average(column(metrics.train, "loss")))
    rows = [{"step": row["step"], "perplexity": value} for row, value in zip(metrics.train, perplexity, strict=True)]
    labels = plot_line(axes, rows, "perplexity", "train")
    labels += plot_evals(axes, metrics.rows("validation"), "perplexity", "validation")
    if labels:
        set_log_scale(axes)
    return labels


def draw_learning_rate(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    _, muon_rates = finite_points(metrics.train, "muon_lr")
    labels = plot_line(axes, metrics.train, "lr", "AdamW" if muon_rates.size else "last")
    if labels:
        steps, rates = finite_points(metrics.train, "lr")
        axes.fill_between(*downsample(steps, rates), color=BLUE, alpha=0.08, linewidth=0)
        labels += plot_line(axes, metrics.train, "muon_lr", "Muon", color=GREEN)
        axes.set_ylim(0, (max(rates.max(), muon_rates.max(initial=0.0)) or 1.0) * 1.1)
        set_ticks(axes.yaxis, MaxNLocator(5, steps=[1, 2, 5, 10]), format_number)
    return labels


def draw_grad_norm(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    labels = plot_line(axes, metrics.train, "grad_norm", "norm", smooth=True)
    if labels:
        max_norm = as_float(section(config, "optim").get("max_grad_norm"))
        if max_norm > 0:
            axes.axhline(max_norm, color=VERMILION, linewidth=1.2, linestyle=DASHED)
            labels.append(Label(max_norm, f"clipped at\n{format_number(max_norm)}", VERMILION))
        set_log_scale(axes)
    return labels


def draw_throughput(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    labels = plot_line(axes, metrics.train, "tokens_per_s", "tokens/s", smooth=True)
    if not labels:
        return []
    axes.set_ylim(0, (finite_points(metrics.train, "tokens_per_s")[1].max() or 1.0) * 1.15)
    set_ticks(axes.yaxis, None, format_si)
    _, mfu = finite_points(metrics.train, "mfu")
    if mfu.size:  # its curve would have the same shape
        axes.set_title(f"Tokens per second, at the end {format_percent(moving_average(mfu)[-1])} MFU")
    return labels


def draw_accuracy(axes: Axes, metrics: Metrics, config: Row) -> list[Label]:
    cloze, hellaswag = metrics.rows("cloze"), metrics.rows("hellaswag")
    labels = plot_evals(axes, metrics.rows("validation"), "token_accuracy", "next token", format_value=format_percent)
    labels += plot_evals(axes, cloze, accuracy_key(cloze), "cloze", GREEN, "s", format_percent)
    labels += plot_evals(axes, hellaswag, accuracy_key(hellaswag), "HellaSwag", PURPLE, "D", format_percent)
    chances = {chance_accuracy(name, metrics.last(name)) for name in ("cloze", "hellaswag") if metrics.rows(name)}
    for chance in filter(None, chances):
        axes.axhline(chance, color=GRAY, linewidth=1.2, linestyle=DOTTED)
        labels.append(Label(chance, f"chance\n{chance * 100:.0f} %", GRAY))
    reference = find_reference(config) if hellaswag else None
    if reference:  # known only for the end of the published run
        curve = reference.curves["hellaswag"]
        (value,) = curve.values
        axes.axhspan(value - curve.band, value + curve.band, color=INK, alpha=0.1, linewidth=0)
        axes.axhline(value, color=INK, linewidth=1.1, linestyle=DASHED)
        labels.append(Label(value, f"{reference.name}\nat its end {100 * value:.2f} %", INK))
    if labels:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        set_ticks(axes.yaxis, MaxNLocator(6, steps=[1, 2, 5, 10]), lambda value: f"{value * 100:g} %")
    return labels


PLOTS: dict[str, Plot] = {
    "loss": Plot(draw_loss, "Loss, nats per token", "Training and validation loss by step", 10.4, 4.7),
    "loss_compact": Plot(
        draw_loss, "Loss, nats per token", "Training and validation loss by step, for narrow pages", height=3.9
    ),
    "components": Plot(
        draw_components, "Training loss by component", "Training loss of each component of a mixture by step"
    ),
    "perplexity": Plot(draw_perplexity, "Perplexity", "Training and validation perplexity by step"),
    "accuracy": Plot(
        draw_accuracy, "Accuracy", "Accuracy by step: next token, cloze and HellaSwag where measured"
    ),
    "grad_norm": Plot(draw_grad_norm, "Gradient norm, before clipping", "Gradient norm before clipping by step"),
    "learning_rate": Plot(draw_learning_rate, "Learning rate", "Learning rate by step"),
    "throughput": Plot(
        draw_throughput, "Tokens per second", "Tokens per second by step, and MFU where the device's peak is known"
    ),
}  # fmt: skip
