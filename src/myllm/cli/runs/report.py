"""`myllm report`: the page of one run, or a comparison of several."""

from collections.abc import Sequence
from pathlib import Path

from myllm.errors import UserError


def draw(names: Sequence[str]) -> Path:
    """Write the page of these runs.

    Raises:
        UserError: a run does not exist or has no rows yet.
    """
    from myllm.runs.history import find_run, read_metrics

    if not names:
        raise UserError("missing RUNS: name a run, or several to compare; `myllm runs` lists them")
    runs = [find_run(name) for name in dict.fromkeys(names)]
    for run in runs:
        read_metrics(run.metrics)  # raises for a missing run before Matplotlib is imported, which takes a second
    if len(runs) == 1:
        from myllm.runs.report.html import write_report

        return write_report(runs[0])
    from myllm.runs.compare.page import write_comparison

    return write_comparison(runs)
