"""comparison.html: curves of several runs over each other, and their numbers side by side."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from myllm import paths
from myllm.errors import UserError
from myllm.files import write_text
from myllm.paths import RunPaths
from myllm.runs.report.page import page_template

from . import tables
from .curves import chart_data, read_run

MAX_RUNS = 16
"""Eight colors, solid and dashed."""
MAX_TITLE = 60
"""Longer lists of names are in the legend only."""


def write_comparison(runs: Sequence[RunPaths]) -> Path:
    """Write the page of these runs to temp_data/comparisons.

    Raises:
        UserError: a run does not exist or has no rows, or there are too many.
    """
    if len(runs) > MAX_RUNS:
        raise UserError(f"{len(runs)} runs, expected at most {MAX_RUNS}: their curves could not be told apart")
    compared = [read_run(run) for run in runs]
    name = ", ".join(run.name for run in compared)
    page = page_template(__package__).render(
        name=name if len(name) <= MAX_TITLE else f"{len(compared)} runs",
        data=chart_data(compared),
        warnings=tables.warnings(compared),
        summaries=tables.summaries(compared),
        evaluations=tables.evaluations(compared),
        differences=tables.differences(compared),
        samples=tables.samples(compared),
        names=[run.name for run in compared],
    )
    path = comparison_path([run.root.name for run in runs])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def comparison_path(names: Sequence[str]) -> Path:
    """The page of runs of these names: the same runs have the same page."""
    name = "+".join(names)
    if len(name.encode()) > 150:
        name = f"{names[0][:60]}+{len(names) - 1}-more-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return paths.comparisons_dir() / f"{name}.html"
