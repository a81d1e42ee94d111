"""A run's folder: claimed by one process at a time, started fresh or taken up again."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import MANIFEST, verify
from .config import RunConfig, to_dict
from .errors import UserError
from .files import locked, write_json
from .metrics import JsonLines
from .paths import RunPaths
from .retention import list_checkpoints


@contextmanager
def claimed(run: RunPaths) -> Iterator[None]:
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
        stack.enter_context(locked(run.root / ".lock", wait=False))
    except BlockingIOError:
        raise UserError(
            f"another process is training in {run.root}; stop it first, or give this run another --name"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {run.root}: {error.strerror}; make it one that can be written, give another "
            "--name, or set MYLLM_DATA to another folder"
        ) from None


def move_aside(run: RunPaths) -> Path | None:
    """Make room for a fresh run without deleting anything: the old folder's contents move to one with the date.

    Returns:
        where they are now, or None if there was nothing.
    """
    old = [path for path in run.root.iterdir() if path.name != ".lock"]
    if not old:
        return None
    aside = run.root.with_name(f"{run.root.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    while aside.exists():  # twice within a second
        aside = aside.with_name(f"{aside.name}-again")
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    return aside


def check_resumable(saved: dict[str, Any], config: RunConfig, folder: Path, imported: bool = False) -> list[str]:
    """Which settings differ from those of the checkpoint in `folder`, as "optim.max_lr: 0.001 -> 0.002".

    How long to train, at what rate and on what machine may change. What the weights mean may not.

    Args:
        imported: weights from elsewhere, whose order of the data has yet to be chosen.

    Raises:
        UserError: the model or the order of the data would be another.
    """
    changed = list(_differences(saved, to_dict(config), ""))
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
    JsonLines(run.metrics).keep(lambda row: row["step"] < step or (row["step"] == step and row["kind"] == "train"))
    JsonLines(run.samples).keep(lambda row: row["step"] < step)


def write_config(run: RunPaths, config: RunConfig) -> None:
    values = to_dict(config)
    values["train"]["fresh"] = False  # a wish of one start, not a property of the run
    write_json(run.config, values)


def latest_checkpoint(where: str, runs: Path) -> Path:
    """The checkpoint that a user means: a folder that holds one, whatever its name, a run's folder, or a run's name.

    Raises:
        UserError: nothing there.
    """
    for root in (Path(where).expanduser(), runs / where):
        # Data sets have a manifest too, but no state.
        if (root / MANIFEST).is_file() and (root.name.startswith("step_") or (root / "state.json").is_file()):
            return root
        found = list_checkpoints(root / "checkpoints") or list_checkpoints(root)  # a run, or its best/
        if intact := next((folder for folder in found if not list(verify(folder))), None):
            return intact
        if found:
            raise UserError(f"no checkpoint in {found[0].parent} is intact: {'; '.join(verify(found[0]))}")
    known = sorted(path.name for path in runs.glob("*") if (path / "checkpoints").is_dir())
    raise UserError(f"no checkpoint at {where!r}; runs with checkpoints: {', '.join(known) or 'none yet'}")


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
