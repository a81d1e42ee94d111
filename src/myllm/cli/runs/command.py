"""The commands `myllm runs ...`."""

import dataclasses
import json
import math
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from myllm.errors import UserError
from myllm.formatting import format_bytes, format_si, format_table

if TYPE_CHECKING:
    from myllm.paths import RunPaths
    from myllm.runs.catalog import RunSummary
    from myllm.runs.lifecycle import ArchivePlan

Positional = tyro.conf.Positional

TITLES = ("name", "preset", "step", "loss", "val loss", "tokens", "size", "state")


def list_runs(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """List the runs of this machine, the newest first.

    `myllm runs delete`, `rename`, `archive` and `sync` do something with them.

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
    print(_table(runs) if runs else f"no runs under {paths.runs_dir()} yet")
    for path in catalog.archives():
        print(f"archived: {path.name}, {format_bytes(path.stat().st_size)}")


def sync(run: Positional[str], to: Literal["tensorboard", "wandb", "trackio", "mlflow"]) -> None:
    """Send the metrics of a run to an experiment tracker, all that it does not have.

    Args:
        run: name or folder of the run.
        to: the tracker.
    """
    from myllm.runs.history import find_run, read_metrics
    from myllm.runs.trackers import background
    from myllm.runs.trackers.destinations import check_installed, view_command

    check_installed((to,))
    folder = find_run(run)
    read_metrics(folder.metrics)  # raises for a missing run
    print(f"{background.sync(folder, to):,} rows sent to {to}: {view_command(to, folder)}")


def _table(runs: "list[RunSummary]") -> str:
    from myllm import paths

    rows = [
        (
            run.name, run.preset or "-", f"{run.step:,}", _number(run.train_loss), _number(run.validation_loss),
            "-" if math.isnan(run.tokens) else format_si(run.tokens), format_bytes(run.bytes), run.state,
        )
        for run in runs
    ]  # fmt: skip
    total = format_bytes(sum(run.bytes for run in runs))
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    return f"{format_table([TITLES, *rows], right=range(2, 7))}\n\n{count}, {total}, under {paths.runs_dir()}"


def _number(loss: float) -> str:
    return "-" if math.isnan(loss) else f"{loss:.4f}"


def delete(names: Positional[tuple[str, ...]], yes: bool = False) -> None:
    """Delete runs, with their checkpoints.

    Args:
        names: names of runs.
        yes: don't ask.
    """
    from myllm.files import folder_bytes
    from myllm.runs import lifecycle

    if not names:
        raise UserError("missing NAMES: which runs? `myllm runs` lists them")
    runs = [lifecycle.find_own_run(name) for name in dict.fromkeys(names)]
    sizes = [folder_bytes(run.root) for run in runs]
    for run, size in zip(runs, sizes, strict=True):
        with lifecycle.hold_run(run):  # raises before anything is deleted
            pass
        print(f"{run.root}: {format_bytes(size)}, {_describe(run)}")
    total = format_bytes(sum(sizes))
    confirm(f"Delete {'this run' if len(runs) == 1 else f'these {len(runs)} runs'}, {total}?", yes)
    for run in runs:
        lifecycle.delete_run(run)
    print(f"deleted {len(runs)} run{'s' if len(runs) > 1 else ''}, {total}")


def rename(old: Positional[str], new: Positional[str]) -> None:
    """Give a run another name. Training resumes under the new name.

    Args:
        old: name of a run.
        new: its new name.
    """
    from myllm.runs import lifecycle
    from myllm.runs.history import read_json_or_empty

    run = lifecycle.rename_run(lifecycle.find_own_run(old), new)
    print(f"{old} is now {new}, in {run.root}")
    command = read_json_or_empty(run.environment).get("command")
    if isinstance(command, list):
        print(f"resume it with: {shlex.join(command)}")
    if run.report.is_file():
        print(f"its report has the old name until: myllm report {shlex.quote(new)}")


def archive(name: Positional[str], yes: bool = False) -> None:
    """Replace a run by one file with its newest checkpoint, its best one, and everything small.

    Args:
        name: name of a run.
        yes: don't ask.
    """
    from myllm.runs import lifecycle

    run = lifecycle.find_own_run(name)
    with lifecycle.hold_run(run):
        plan = lifecycle.plan_archive(run)
    before, left_out = (sum(path.stat().st_size for path in paths) for paths in (plan.files, plan.left_out))
    kept = ", ".join(str(folder.relative_to(run.root)) for folder in plan.checkpoints) or "no checkpoint"
    print(f"{run.root}: {format_bytes(before + left_out)}, {_describe(run)}")
    print(f"  kept      {format_bytes(before)}: {kept} and everything small")
    if plan.left_out:
        print(f"  not kept  {format_bytes(left_out)}: {_folders(plan)}")
    confirm(f"Archive it as {plan.path} and delete the folder?", yes)
    path = lifecycle.archive_run(plan)
    print(f"{path}: {format_bytes(path.stat().st_size)}, before {format_bytes(before + left_out)}")
    print(f"unpack it with: tar -xzf {shlex.quote(str(path))} -C {shlex.quote(str(path.parent))}")


def confirm(question: str, yes: bool) -> None:
    """Go on only if the user says yes; else the command ends with exit code 1, and nothing has changed.

    Args:
        yes: the command has --yes: don't ask.

    Raises:
        UserError: there is no terminal to ask on.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} There is no terminal to answer on; give --yes to do it")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        print("nothing was changed")
        raise SystemExit(1)


def _folders(plan: "ArchivePlan") -> str:
    """The checkpoints and large files that an archive leaves out."""
    parts = [path.relative_to(plan.run.root).parts[:2] for path in plan.left_out]
    return ", ".join(dict.fromkeys("/".join(part) for part in parts))


def _describe(run: "RunPaths") -> str:
    from myllm.runs.catalog import summarize

    summary = summarize(run)
    return f"step {summary.step:,}, {summary.state}"
