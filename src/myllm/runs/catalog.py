"""All runs under temp_data/runs: what they are, how far they came, and what they take on the disk."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm import paths
from myllm.checkpoint.layout import newest_step
from myllm.errors import UserError
from myllm.files import folder_bytes, is_locked
from myllm.paths import RunPaths
from myllm.presets import PRESETS

from .heartbeat import read_state
from .history import Metrics, Row, as_float, get_text, read_json_or_empty, read_metrics

ARCHIVE_SUFFIX = ".tar.gz"


@dataclass(frozen=True)
class RunSummary:
    """One run. A number that it has not recorded is NaN."""

    name: str
    preset: str | None
    """The preset that its command named."""
    step: int
    train_loss: float
    validation_loss: float
    """Nats per token, the newest ones."""
    tokens: float
    """Tokens trained on so far."""
    bytes: int
    state: str
    """running, complete, stopped, failed, died, not responding, imported or not known."""
    changed: float
    """When it last wrote, in seconds since 1970."""


def list_runs() -> list[RunSummary]:
    """The runs under temp_data/runs, the newest first."""
    folders = [folder for folder in paths.runs_dir().glob("[!.]*") if folder.is_dir()]
    return sorted((summarize(RunPaths(folder)) for folder in folders), key=lambda run: (-run.changed, run.name))


def archives() -> list[Path]:
    """The files of archived runs."""
    return sorted(paths.runs_dir().glob(f"[!.]*{ARCHIVE_SUFFIX}"))


def summarize(run: RunPaths) -> RunSummary:
    try:
        metrics = read_metrics(run.metrics)
    except UserError:  # no rows yet
        metrics = Metrics([], {})
    train, validation = metrics.last(), metrics.last("validation")
    step = max(train.get("step", 0), validation.get("step", 0), newest_step(run.checkpoints))
    times = [path.stat().st_mtime for path in (run.metrics, run.heartbeat, run.config, run.root) if path.exists()]
    return RunSummary(
        name=run.root.name,
        preset=preset_of(read_json_or_empty(run.environment)),
        step=step,
        train_loss=as_float(train.get("loss")),
        validation_loss=as_float(validation.get("loss")),
        tokens=as_float(train.get("tokens")),
        bytes=folder_bytes(run.root),
        state=state_of(run),
        changed=max(times[:-1] or times, default=math.nan),  # any program may change the folder itself
    )


def state_of(run: RunPaths) -> str:
    """A word for a run's state; it is running if a process holds its folder, whatever the heartbeat says."""
    return "running" if is_locked(run.root / ".lock") else recorded_state(run)


def recorded_state(run: RunPaths) -> str:
    """The state that a run's files say."""
    try:
        return read_state(run.heartbeat).word
    except (OSError, UserError):
        return "imported" if run.imported.is_file() and not run.metrics.is_file() else "not known"


def preset_of(environment: Row) -> str | None:
    """The preset in the command of an environment.json; None if it named none."""
    command: Any = environment.get("command") or []
    words = command.split() if isinstance(command, str) else command
    return next((word for word in words if word in PRESETS), None)


def runs_by_dataset() -> dict[str, list[str]]:
    """Names of the runs that train on a data set, or did, by the name of the data set."""
    users: dict[str, list[str]] = {}
    for path in sorted(paths.runs_dir().glob("[!.]*/environment.json")):
        environment = read_json_or_empty(path)
        for used in environment.get("components") or [environment]:  # of a mixture
            if dataset := get_text(used, "dataset"):
                users.setdefault(dataset, []).append(path.parent.name)
    return users
