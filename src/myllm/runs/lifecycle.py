"""Delete, rename and archive runs that no process uses."""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm import paths
from myllm.checkpoint.integrity import iter_intact, verify_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.errors import UserError, did_you_mean, warn
from myllm.files import atomic_write, file_lock, file_sha256, fsync_dir, read_json, temporary_dir, write_json
from myllm.paths import RunPaths
from myllm.planning.config_checks import name_errors

from .catalog import ARCHIVE_SUFFIX, recorded_state
from .history import read_json_or_empty

LOCKS = (".lock", ".publish.lock")
SMALL_BYTES = 50_000_000
"""Larger files in other folders than those of checkpoints, such as traces of the profiler, are not archived."""


def find_own_run(name: str) -> RunPaths:
    """A run under temp_data/runs, as `find_own_folder`."""
    return RunPaths(find_own_folder("run", paths.runs_dir(), name))


def find_own_folder(kind: str, root: Path, name: str) -> Path:
    """A run or data set by its name alone: a folder elsewhere is not ours to remove.

    Args:
        kind: "run" or "data set", for messages.

    Raises:
        UserError: there is none of that name, or it is a link.
    """
    known = sorted(path.name for path in root.glob("[!.]*") if path.is_dir())
    folder = root / name
    if name not in known:
        raise UserError(
            f"no {kind} {name!r} under {root}{did_you_mean(name, known)}; known: {', '.join(known) or 'none'}"
        )
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {folder.resolve()}; change the link and its folder by hand")
    return folder


@contextmanager
def hold_run(run: RunPaths) -> Iterator[None]:
    """Hold a run that no process trains, publishes or sends to a tracker.

    Raises:
        UserError: one does, on this machine or another.
    """
    with ExitStack() as stack:
        try:
            for path in (*(run.root / name for name in LOCKS), *run.trackers.glob("*.lock")):
                stack.enter_context(file_lock(path, wait=False))
        except BlockingIOError:
            raise UserError(
                f"a process trains or publishes in {run.root}, or sends its rows to a tracker; stop it first"
            ) from None
        if recorded_state(run) == "running":
            raise UserError(f"{run.root} is in use: its heartbeat is fresh; see `myllm status {run.root.name}`")
        yield


def delete_run(run: RunPaths) -> None:
    """Delete a run.

    Raises:
        UserError: it is in use.
    """
    with hold_run(run):
        _remove(run)


def _remove(run: RunPaths) -> None:
    """If this is killed, what is left is out of the way, and is removed with the next run of that name."""
    with temporary_dir(run.root) as folder:  # removed at the end, with everything in it
        run.root.rename(folder / run.root.name)
        fsync_dir(folder.parent)
    paths.micro_batch_file(run.root.name).unlink(missing_ok=True)


def rename_run(run: RunPaths, name: str) -> RunPaths:
    """Give a run another name. Its checkpoints keep the old one, which nothing compares.

    Raises:
        UserError: it is in use, or the new name is taken or is no name for a run.
    """
    new = RunPaths.of(name)
    if errors := name_errors(name):
        raise UserError(errors[0])
    if new.root.exists() or new.root.is_symlink():
        raise UserError(f"there is a run {name!r} already, in {new.root}; give another name")
    with hold_run(run):
        # The folder last: if this is interrupted, the same command does the rest.
        if run.config.is_file():
            write_json(run.config, renamed_config(read_json(run.config), run.root.name, name))
        environment = read_json_or_empty(run.environment)
        if isinstance(command := environment.get("command"), list):
            write_json(run.environment, environment | {"command": with_name(command, name)})
        if (micro_batch := paths.micro_batch_file(run.root.name)).is_file():
            micro_batch.replace(paths.micro_batch_file(name))
        run.root.rename(new.root)
        fsync_dir(new.root.parent)
    return new


def renamed_config(config: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """A config.json with another name; an imported run also names the tokenizer in its own folder."""
    data = config.get("data")
    if isinstance(data, dict) and str(data.get("tokenizer")).startswith(f"runs/{old}/"):
        config["data"] = data | {"tokenizer": f"runs/{new}/" + data["tokenizer"].removeprefix(f"runs/{old}/")}
    return config | {"name": new}


def with_name(command: Sequence[str], name: str) -> list[str]:
    """The words of a command that starts a run, with another --name."""
    words = [str(word) for word in command]
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != "--name" and word != "--name" and not word.startswith("--name=")
    ]
    return [*kept, "--name", name]


@dataclass(frozen=True)
class ArchivePlan:
    """What an archive of a run would hold."""

    run: RunPaths
    checkpoints: list[Path]
    """The newest intact one, and that of best/."""
    files: list[Path]
    """Files to keep, those of the checkpoints included."""
    left_out: list[Path]

    @property
    def path(self) -> Path:
        return self.run.root.with_name(f"{self.run.root.name}{ARCHIVE_SUFFIX}")


def plan_archive(run: RunPaths) -> ArchivePlan:
    """Choose the newest intact checkpoint, best/, and every small file. The checkpoints are hashed.

    Raises:
        UserError: the run has checkpoints, but none is intact.
    """
    folders = list_checkpoints(run.checkpoints)
    newest = next(iter_intact(folders, warn, verify_checkpoint), None)
    if folders and newest is None:
        raise UserError(f"no checkpoint in {run.checkpoints} is intact; nothing was archived")
    checkpoints = [folder for folder in (newest, *list_checkpoints(run.best)) if folder is not None]
    files: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(path for path in run.root.rglob("*") if path.is_file() and not path.name.endswith(".lock")):
        is_kept = any(path.is_relative_to(folder) for folder in checkpoints) or (
            not path.is_relative_to(run.checkpoints) and (path.parent == run.root or path.stat().st_size <= SMALL_BYTES)
        )
        (files if is_kept else left_out).append(path)
    return ArchivePlan(run, checkpoints, files, left_out)


def archive_run(plan: ArchivePlan) -> Path:
    """Write the archive, compare it with the run, and delete the run.

    Raises:
        UserError: the run is in use, there is an archive of that name already, or the archive is not what was written.
    """
    run, path = plan.run, plan.path
    with hold_run(run):
        if path.exists():
            raise UserError(f"{path} exists already; rename the run or move the archive away")
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
            for member in plan.files:
                archive.add(member, f"{run.root.name}/{member.relative_to(run.root)}", recursive=False)
        _compare(path, run)
        _remove(run)
    return path


def _compare(path: Path, run: RunPaths) -> None:
    with tarfile.open(path) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            stored: Any = archive.extractfile(member)
            if hashlib.file_digest(stored, "sha256").hexdigest() != file_sha256(run.root.parent / member.name):
                path.unlink()
                raise UserError(f"{member.name} in {path} is not what was written; the run is kept: check the disk")
