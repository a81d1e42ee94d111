"""From the files a run leaves behind to plots and one self-contained HTML page.

    metrics.jsonl ─▶ history ─▶ plots (drawing) ─▶ plots/*.png ─▶ page ─▶ report.html

Nothing here needs torch: a report opens as fast on a laptop as where the run was trained, and while it still runs.
Matplotlib comes with the first picture: training reads a run's files through here, and does without it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from myllm.files import write_text
from myllm.paths import RunPaths
from myllm.runs.history import Metrics, Row, find_run, read_config, read_json_or_empty, read_metrics, read_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_plots", "figure", "find_run", "read_metrics", "write_report"]


def figure(name: str, metrics: Metrics, config: Row | None = None) -> "Figure | None":
    """One figure of a run, as plots.figure."""
    from . import plots

    return plots.figure(name, metrics, config)


def draw_plots(run: RunPaths) -> list[Path]:
    """Draw every figure the run has numbers for into plots/.

    Raises:
        UserError: if the run or its metrics do not exist or hold no rows.
    """
    metrics, config = read_metrics(run.metrics), read_config(run.config)
    from .plots import save_figures

    return list(save_figures(metrics, config, run.plots).values())


def write_report(run: RunPaths) -> Path:
    """Draw the figures into plots/ and write report.html: one file that needs no other.

    Raises:
        UserError: if the run or its metrics do not exist or hold no rows.
    """
    metrics, config = read_metrics(run.metrics), read_config(run.config)
    from .html import ReportData, render_page
    from .plots import save_figures

    figures = save_figures(metrics, config, run.plots)
    findings = ReportData(
        name=run.root.name,
        metrics=metrics,
        samples=read_samples(run.samples),
        config=config,
        environment=read_json_or_empty(run.environment),
        figures={name: path.read_bytes() for name, path in figures.items()},
    )
    # Written whole or not at all: a browser may be reloading the page while training goes on.
    write_text(run.report, render_page(findings))
    return run.report
