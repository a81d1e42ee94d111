"""The commands `myllm runs ...`."""

import dataclasses
import json
import math
from typing import Annotated

import tyro

from myllm.formatting import format_bytes, format_si, format_table

TITLES = ("name", "preset", "step", "loss", "val loss", "tokens", "size", "state")


def list_runs(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """List the runs of this machine, the newest first.

    Args:
        as_json: print one JSON object per line.
    """
    from myllm import paths
    from myllm.files import json_safe
    from myllm.runs import catalog

    runs = catalog.list_runs()
    if as_json:
        for run in runs:
            print(json.dumps(json_safe(dataclasses.asdict(run)), ensure_ascii=False))
        return
    if not runs:
        print(f"no runs under {paths.runs_dir()} yet")
        return
    rows = [
        (
            run.name, run.preset or "-", f"{run.step:,}", _number(run.train_loss), _number(run.validation_loss),
            "-" if math.isnan(run.tokens) else format_si(run.tokens), format_bytes(run.bytes), run.state,
        )
        for run in runs
    ]  # fmt: skip
    print(format_table([TITLES, *rows], right=range(2, 7)))
    total = format_bytes(sum(run.bytes for run in runs))
    print(f"\n{len(runs)} run{'s' if len(runs) > 1 else ''}, {total}, under {paths.runs_dir()}")


def _number(loss: float) -> str:
    return "-" if math.isnan(loss) else f"{loss:.4f}"
