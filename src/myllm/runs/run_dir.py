"""A run's folder: held by one process at a time, started over or resumed."""

import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from myllm.checkpoint.retention import dated_path
from myllm.config import RunConfig, to_dict
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError
from myllm.files import file_lock, write_json
from myllm.paths import RunPaths

from .history import read_json_or_empty
from .logs import JsonlFile

PROBE = ".shared-"
"""Prefix of the file by which ranks check that they share a disk."""
NETWORK_DISK_S = 20.0
"""Network disks may take some seconds to show one machine a new file of another."""


@contextmanager
def claim_run(run: RunPaths) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises:
        UserError: another process is training there, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(run.root / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(
                f"another process is training in {run.root}; stop it first, or give this run another --name"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {run.root}: {error.strerror}; make it writable, give another --name, or "
                "set MYLLM_DATA to another folder"
            ) from None
        yield


def check_shared_disk(run: RunPaths, process: DistContext) -> None:
    """Check that all ranks see the same run folder: each rank writes a part of a checkpoint and reads all of it.

    Raises:
        UserError: on all ranks, if a machine has another folder under that name.
    """
    if process.world_size == 1:
        return
    probe = run.root / f"{PROBE}{distributed.broadcast_object(secrets.token_hex(8))}"
    if process.is_rank_zero:
        for old in run.root.glob(f"{PROBE}*"):
            old.unlink(missing_ok=True)
        probe.touch()
    distributed.barrier()
    hosts = distributed.all_gather_object(None if _appears(probe) else socket.gethostname())
    if process.is_rank_zero:
        probe.unlink(missing_ok=True)
    others = sorted({host for host in hosts if host is not None})
    if others:
        raise UserError(
            f"{run.root} on {', '.join(others)} is not the folder that rank 0 has there; every rank writes a part of "
            "each checkpoint, so all machines need the same one: set MYLLM_DATA to a folder on a disk that they share, "
            "or make its runs/ a link to one"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + NETWORK_DISK_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def archive_old_run(run: RunPaths) -> Path | None:
    """Move everything in a run's folder to a new folder with the date in its name.

    Returns:
        the new folder, or None if there was nothing to move.
    """
    old = [path for path in run.root.iterdir() if path.name != ".lock"]
    if not old:
        return None
    archive = dated_path(run.root)
    archive.mkdir()
    for path in old:
        path.rename(archive / path.name)
    return archive


def check_new_weights(run: RunPaths) -> None:
    """Refuse to train new weights under the name of a run that began with those of another model.

    Raises:
        UserError: this is such a run.
    """
    if run.imported.is_file():
        source = read_json_or_empty(run.imported).get("source")
        raise UserError(
            f"the run {run.root.name} began with the weights of {source}; to begin with them again, give --init.from; "
            "to begin with new ones, give another --name"
        )


def imported_weights_error(run: RunPaths) -> UserError:
    name = shlex.quote(run.root.name)
    return UserError(
        f"the run {run.root.name} holds imported weights; begin another run with them: --init.from {name} --name NAME"
    )


def truncate_logs(run: RunPaths, step: int) -> None:
    """Drop rows that training will write again after resuming from `step`.

    That includes evaluations at `step` itself: they run after the save, so some may be missing, and all run again.
    """
    JsonlFile(run.metrics).keep(lambda row: row["step"] < step or (row["step"] == step and row.get("kind") != "eval"))
    JsonlFile(run.samples).keep(lambda row: row["step"] < step)


def write_config(run: RunPaths, config: RunConfig) -> None:
    values = to_dict(config)
    values["train"]["fresh"] = False  # applies to one start only
    write_json(run.config, values)


def next_steps(config: RunConfig, stopped_early: bool = False, epochs: float | None = None) -> str:
    """Where the files of a run are, and what to type next.

    Args:
        epochs: the length of the run, if the command gave it in epochs.
    """
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
  resume       the same command; with {longer} it continues from here
  full run     ./run_pre_training_e2e.sh lf-llm-269m --dry-run   (shows its cost; without --dry-run it starts)"""


def _myllm() -> str:
    """The command line as a user can type it here: by name if it is on the PATH, else by its path."""
    beside = Path(sys.executable).parent / "myllm"
    on_path = shutil.which("myllm")
    if on_path and Path(on_path).resolve() == beside.resolve():
        return "myllm"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m myllm"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))
