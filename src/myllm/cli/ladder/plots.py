"""The figures of a ladder, drawn from ladder.json and ablation.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from myllm.formatting import format_si
from myllm.runs.report.axes import BLUE, GRAY, GREEN, INK, PURPLE, VERMILION, set_ticks
from myllm.runs.report.plots import styled_figure

STYLES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "D"), (PURPLE, "^"), (INK, "v"))
"""Color and marker of each recipe or pair."""
Values = Mapping[str, Any]


def draw_losses(ladder: Values) -> Figure:
    """Final loss against tokens, a panel for each size: seeds, the joint law, and the held-out rung as open points."""
    analysis = ladder["analysis"]
    sizes, tokens = analysis["parameters"], analysis["tokens"]
    with styled_figure(4.2 * len(sizes), 3.9, columns=len(sizes)) as (figure, panels):
        for size, axes in enumerate(panels):
            axes.set_title(f"width {ladder['widths'][size]}, N {format_si(sizes[size])}")
            for recipe, name in enumerate(ladder["recipes"]):
                color, marker = STYLES[recipe % len(STYLES)]
                if curves := analysis["joint"].get("curves"):
                    axes.plot(curves["tokens"], curves["losses"][recipe][size], color=color, linewidth=1.2, alpha=0.8)
                means = analysis["mean_losses"][recipe][size]
                for length, (x, y) in enumerate(zip(tokens, means, strict=True)):
                    held_out = size == len(sizes) - 1 and length == len(tokens) - 1
                    axes.plot(
                        x, y, marker=marker, color=color, markersize=7, markerfacecolor="white" if held_out else color,
                        linestyle="none", label=name if length == 0 else None, zorder=3,
                    )  # fmt: skip
            _log_axis(axes, tokens, "tokens")
        panels[0].set_ylabel("final validation loss, nats per token")
        panels[0].legend(frameon=False)
    return figure


def draw_multipliers(ladder: Values) -> Figure:
    """How many times fewer tokens, against size: of the law at each size with its band, and of the joint law."""
    analysis = ladder["analysis"]
    sizes = np.array(analysis["parameters"])
    with styled_figure(6.4, 4.2) as (figure, (axes,)):
        axes.set_title("Fewer tokens for the same loss, and 95 % bands")
        for index, (first, second) in enumerate(analysis["pairs"]):
            color, marker = STYLES[index % len(STYLES)]
            shift = 1.03 ** (index - 1)
            for law, filled in (("per_size", True), ("joint", False)):
                if "missing" in analysis[law]:
                    continue
                bands = analysis[law]["multipliers"][index]
                values, lows, highs = (np.array([band[key] for band in bands]) for key in ("value", "low", "high"))
                axes.errorbar(
                    sizes * shift * (1 if filled else 1.01), values, [values - lows, highs - values], color=color,
                    marker=marker, linestyle="none", capsize=3, markerfacecolor=color if filled else "white",
                    label=f"{second} against {first}" if filled else None,
                )  # fmt: skip
        axes.axhline(1, color=GRAY, linewidth=1)
        axes.set_ylabel("tokens of the first / tokens of the second")
        _log_axis(axes, sizes, "N, matrices and head")
        axes.legend(
            frameon=False,
            title="filled: law at each size; open: joint law",
            bbox_to_anchor=(0.5, -0.16),
            loc="upper center",
        )
    return figure


def draw_search(record: Sequence[Values]) -> Figure:
    """Loss against the factor on the first guess of the rates; open points: AdamW's rate alone."""
    names = list(dict.fromkeys(row["recipe"] for row in record))
    with styled_figure(4.2 * len(names), 3.6, columns=len(names)) as (figure, panels):
        for axes, name in zip(panels, names, strict=True):
            axes.set_title(name)
            for index, row in enumerate(row for row in record if row["recipe"] == name):
                color, marker = STYLES[index % len(STYLES)]
                powers = sorted(map(int, row["losses"]))
                losses = np.array([row["losses"][str(power)] for power in powers])
                axes.plot(powers, losses, color=color, marker=marker, label=f"width {row['width']}")
                if alone := row["max_lr_alone"]:
                    best = powers[int(losses.argmin())]
                    steps = sorted(map(int, alone))
                    axes.plot(
                        [best + step for step in steps], np.array([alone[str(step)] for step in steps]), color=color,
                        marker=marker, markerfacecolor="white", linewidth=1, linestyle=":",
                    )  # fmt: skip
            set_ticks(axes.xaxis, None, lambda power: f"x{2.0**power:g}")
            axes.set_xlabel("factor on the first guess")
            axes.legend(frameon=False)
        panels[0].set_ylabel("final validation loss")
    return figure


def draw_ablation(found: Values) -> Figure:
    """Nats lost without each part, with standard errors."""
    parts = found["parts"][::-1]
    with styled_figure(6.4, 1.2 + 0.36 * len(parts)) as (figure, (axes,)):
        axes.set_title(f"{found['recipe']}: nats lost without one part")
        errors = [part["stderr"] or 0.0 for part in parts]
        axes.barh(
            [part["part"] for part in parts],
            [part["lost"] for part in parts],
            xerr=errors if any(errors) else None,
            color=BLUE,
            capsize=3,
        )
        axes.axvline(0, color=GRAY, linewidth=1)
        axes.set_xlabel(f"nats per token, width {found['width']}, {format_si(found['tokens'])} tokens")
    return figure


def _log_axis(axes: Axes, values: Sequence[float] | np.ndarray, label: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    set_ticks(axes.xaxis, FixedLocator(list(values)), format_si)
    axes.set_xlabel(label)
