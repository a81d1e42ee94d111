"""A run's folder: claimed by one process at a time, started fresh or taken up again."""

import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.integrity import HASH_MODEL, verify_checkpoint
from myllm.checkpoint.layout import TOKENIZER, checkpoint_dir
from myllm.checkpoint.retention import PARTIAL, unused_path
from myllm.config import RunConfig, saved_config, to_dict
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError
from myllm.files import file_lock, fsync_dir, write_json
from myllm.paths import RunPaths

from .history import read_json_or_empty
from .logs import JsonlFile

SHARED = ".shared-"
NETWORK_DISK_S = 20.0


@contextmanager
def claim_run(run: RunPaths) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises:
        UserError: another process is training there, or the folder cannot be written.
    """
    with ExitStack() as stack:
        _claim(run, stack)
        yield


def _claim(run: RunPaths, stack: ExitStack) -> None:
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        stack.enter_context(file_lock(run.root / ".lock", wait=False))
    except BlockingIOError:
        raise UserError(
            f"another process is training in {run.root}; stop it first, or give this run another --name"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {run.root}: {error.strerror}; make it one that can be written, give another "
            "--name, or set MYLLM_DATA to another folder"
        ) from None


def check_shared_disk(run: RunPaths, process: DistContext) -> None:
    """Make sure that all ranks see the same run folder: each writes its share of a checkpoint, and reads all of it.

    Raises:
        UserError: on all ranks; a machine has another folder under that name.
    """
    if process.world_size == 1:
        return
    mark = run.root / f"{SHARED}{distributed.broadcast_object(secrets.token_hex(8))}"
    if process.is_rank_zero:
        for left in run.root.glob(f"{SHARED}*"):
            left.unlink(missing_ok=True)
        mark.touch()
    distributed.barrier()
    hosts = distributed.all_gather_object(None if _appears(mark) else socket.gethostname())
    if process.is_rank_zero:
        mark.unlink(missing_ok=True)
    without = sorted({host for host in hosts if host is not None})
    if without:
        raise UserError(
            f"{run.root} on {', '.join(without)} is not the folder that rank 0 has there; every rank writes a part of "
            "each checkpoint, so all machines need the same one: set MYLLM_DATA to a folder on a disk that they share, "
            "or make its runs/ a link to one"
        )


def _appears(path: Path) -> bool:
    """Network disks may take some seconds to show one machine what another has made."""
    deadline = time.monotonic() + NETWORK_DISK_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def archive_old_run(run: RunPaths, but: Path | None = None) -> Path | None:
    """Make room for a fresh run without deleting anything: the old folder's contents move to one with the date.

    Args:
        but: what stays.

    Returns:
        where they are now, or None if there was nothing.
    """
    old = [path for path in run.root.iterdir() if path.name != ".lock" and path != but]
    if not old:
        return None
    aside = unused_path(run.root.with_name(f"{run.root.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    return aside


def start_over(run: RunPaths, config: RunConfig) -> Path | None:
    """Move the old run aside, as `move_aside` does. One that began with imported weights begins with them again.

    Raises:
        UserError: these weights are not there any more, or are of another model; nothing is moved.
    """
    if not run.imported.is_file():
        return archive_old_run(run)
    start = checkpoint_dir(run.checkpoints, 0)
    if faults := list(verify_checkpoint(start)):
        raise UserError(
            f"{run.root.name} began with weights from elsewhere, and {start} does not have them any more "
            f"({'; '.join(faults)}): {_IMPORT_AGAIN.format(run=run.root.name, source=_source(run))}"
        )
    check_resumable(load_checkpoint(start, HASH_MODEL).config, config, start, imported=True)
    aside = archive_old_run(run, but=run.imported)
    if aside is None:
        return None
    shutil.copy2(run.imported, aside)
    run.checkpoints.mkdir()
    work = run.checkpoints / f"{PARTIAL}{start.name}"
    shutil.copytree(aside / start.relative_to(run.root), work)
    work.rename(start)
    fsync_dir(run.checkpoints)
    if (aside / TOKENIZER).is_file():  # the config names it
        shutil.copy2(aside / TOKENIZER, run.root)
    return aside


def check_has_imported_weights(run: RunPaths) -> None:
    """
    Raises:
        UserError: a run without a checkpoint began with imported weights: others would be trained in their name.
    """
    if run.imported.is_file():
        raise UserError(
            f"{run.root.name} began with weights from elsewhere, and has no checkpoint any more: "
            f"{_IMPORT_AGAIN.format(run=run.root.name, source=_source(run))}"
        )


_IMPORT_AGAIN = "`myllm import {source} --name {run} --overwrite` gets them again, another --name starts from scratch"


def _source(run: RunPaths) -> str:
    return shlex.quote(str(read_json_or_empty(run.imported).get("source") or "SOURCE"))


def check_resumable(saved: dict[str, Any], config: RunConfig, folder: Path, imported: bool = False) -> list[str]:
    """Which settings differ from those of the checkpoint in `folder`, as "optim.max_lr: 0.001 -> 0.002".

    How long to train, at what rate and on what machine may change. What the weights mean may not.

    Args:
        imported: weights from elsewhere, whose order of the data has yet to be chosen.

    Raises:
        UserError: the model or the order of the data would be another.
    """
    earlier = to_dict(saved_config(saved, folder / "config.json"))  # what it did not know has today's defaults
    changed = list(_differences(earlier, to_dict(config), ""))
    # The data set itself is compared by its hash, wherever it lies.
    kept = ("model.",) if imported else ("model.", "train.seed", "train.batch_tokens")
    fixed = [line for line in changed if line.startswith(kept)]
    fixed = [line for line in fixed if not line.startswith("model.dropout")]
    if fixed:
        raise UserError(
            f"the checkpoint {folder} was made with other settings:\n"
            + "\n".join(f"  - {line}" for line in fixed)
            + "\ngive the same ones to resume, another --name to start a second run, or --train.fresh to start over "
            "(the old run is moved aside)"
        )
    return changed


def truncate_logs(run: RunPaths, step: int) -> None:
    """Forget rows that training will write again after resuming from `step`.

    Evaluations at the step itself go too: a save comes before them, so they may be missing, and are done once more.
    """
    JsonlFile(run.metrics).keep(lambda row: row["step"] < step or (row["step"] == step and row.get("kind") != "eval"))
    JsonlFile(run.samples).keep(lambda row: row["step"] < step)


def write_config(run: RunPaths, config: RunConfig) -> None:
    values = to_dict(config)
    values["train"]["fresh"] = False  # a wish of one start, not a property of the run
    write_json(run.config, values)


def _differences(old: Any, new: Any, prefix: str) -> Iterator[str]:
    ignored = {"name", "data.workers", "train.fresh", "data.dataset", "hub"}
    for key in sorted({*old, *new}):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if name in ignored or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{name}.")
        else:
            yield f"{name}: {a} -> {b}"


def next_steps(config: RunConfig, stopped_early: bool = False, epochs: float | None = None) -> str:
    """Where a run's files are and what to type next; `epochs` is the run's length where the command gave it so."""
    run, myllm = RunPaths.of(config.name), _myllm()
    name = shlex.quote(config.name)
    prompt = next(iter(config.eval.sample_prompts), "").strip().partition("\n")[0] or "Once upon a time"
    longer = f"a larger --train.max-steps than {config.train.max_steps:,}"
    if epochs is not None:
        longer = f"a larger --train.epochs than {epochs:g}"
    if stopped_early:
        longer = f"a larger --train.early-stop-patience than {config.train.early_stop_patience:,}, or None,"
    best = f"\n  best         {run.best}   (lowest validation loss)" if run.best.is_dir() else ""
    return f"""
everything of this run is in {run.root}
  report       {run.report}
  plots        {run.plots}
  checkpoints  {run.checkpoints}{best}
  numbers      {run.metrics}
what to type next
  sample       {myllm} sample {name} --prompt {shlex.quote(prompt)}
  chat         {myllm} chat {name}
  serve        {myllm} serve {name}   (a page in the browser)
  resume       the same command; with {longer} it trains on from here
  full run     ./run_pre_training_e2e.sh lf-llm-269m --dry-run   (what it costs; without --dry-run it starts)"""


def _myllm() -> str:
    """How to call the command line from here: by its name if that is on the PATH, else beside this Python."""
    beside = Path(sys.executable).parent / "myllm"
    on_path = shutil.which("myllm")
    if on_path and Path(on_path).resolve() == beside.resolve():
        return "myllm"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m myllm"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))
