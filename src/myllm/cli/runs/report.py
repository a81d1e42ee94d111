"""`myllm report`: the page of one run, or a comparison of several."""

from collections.abc import Sequence
from pathlib import Path

from myllm.errors import UserError
from myllm.paths import RunPaths


def report(names: Sequence[str], watch: bool, port: int) -> None:
    """Write the page of these runs and print where it is; or serve it while they train.

    Raises:
        UserError: a run does not exist. Or it has no rows yet, unless that is waited for.
    """
    from myllm.runs.history import find_run, read_metrics

    if not names:
        raise UserError("missing RUNS: name a run, or several to compare; `myllm runs` lists them")
    runs = [find_run(name) for name in dict.fromkeys(names)]
    for run in runs:
        if not (watch and run.root.is_dir()):
            read_metrics(run.metrics)  # raises for a missing run before Matplotlib is imported, which takes a second
    if watch:
        from .watch import serve

        serve(runs, lambda: draw(runs), port)
    else:
        print(draw(runs))


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
