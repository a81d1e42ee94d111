"""`myllm report`: the page of one run, or a comparison of several."""

from collections.abc import Sequence
from pathlib import Path

import tyro

from myllm.errors import UserError
from myllm.paths import RunPaths

Positional = tyro.conf.Positional


def report(runs: Positional[tuple[str, ...]], watch: bool = False, port: int = 8001) -> None:
    """Redraw a run's plots and report.html, or compare several runs on one page.

    Args:
        runs: names or folders of runs.
        watch: serve the page on this machine, and redraw it while the runs train, until Ctrl-C.
        port: port of --watch. 0: any free port.
    """
    from myllm.runs.history import find_run, read_metrics

    if not runs:
        raise UserError("missing RUNS: name a run, or several to compare; `myllm runs` lists them")
    found = [find_run(name) for name in dict.fromkeys(runs)]
    for run in found:
        if not (watch and run.root.is_dir()):
            read_metrics(run.metrics)  # raises for a missing run before Matplotlib is imported, which takes a second
    if watch:
        from .watch import serve

        serve(found, lambda: draw(found), port)
    else:
        print(draw(found))


def draw(runs: Sequence[RunPaths]) -> Path:
    """Write the page of these runs.

    Raises:
        UserError: a run has no rows yet, or is gone.
    """
    if len(runs) == 1:
        from myllm.runs.report.html import write_report

        return write_report(runs[0])
    from myllm.runs.compare.page import write_comparison

    return write_comparison(runs)
