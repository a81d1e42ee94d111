"""Which checkpoints are kept, how the others are deleted, and whether there is space for more.

A folder is renamed before it is deleted, so a process that is killed leaves nothing damaged under a final name.
"""

import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.files import free_bytes, fsync_dir, read_json
from myllm.formatting import format_bytes
from myllm.planning.disk import SPARE_BYTES, checkpoint_bytes, n_added

from .layout import MANIFEST, list_checkpoints, saved_step, step_dir_name, step_of

PARTIAL, REMOVED, REPLACED = ".partial-", ".removed-", ".replaced-"
_TEMPORARY = re.compile(rf"({re.escape(PARTIAL)}|{re.escape(REMOVED)}|{re.escape(REPLACED)})step_[0-9]+")
_SYSTEM_FILES = re.compile(r"\.DS_Store|\._.*|\.nfs.*")
"""Files that file managers and network disks create in any folder."""


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints to keep when a new one is complete."""

    last: int = 0
    """Keep this many of the newest (0: all)."""
    every_steps: int = 0
    """Keep multiples of this forever (0: none)."""
    newest_only: bool = False
    """Keep nothing but the new one."""

    def to_delete(self, new: Path) -> list[Path]:
        """Checkpoints to delete now that `new` is complete."""
        saved = {step_of(folder): folder for folder in list_checkpoints(new.parent) if _has_original_name(folder)}
        superseded = self.superseded(saved, step_of(new))
        return [folder for step, folder in saved.items() if step in superseded and is_removable(folder)]

    def superseded(self, steps: Collection[int], new: int) -> set[int]:
        """The steps that need not be kept now that `new` is complete."""
        if self.newest_only:
            return set(steps) - {new}
        if not self.last:
            return set()
        # Newer ones are damaged, or training would have resumed from them: they must not displace intact ones.
        older = sorted((step for step in steps if step <= new), reverse=True)
        return {step for step in older[self.last :] if not self.every_steps or step % self.every_steps}


KEEP_ALL = RetentionPolicy()


def _has_original_name(folder: Path) -> bool:
    """False for a folder that a user copied or renamed."""
    step = step_of(folder)
    return folder.name == step_dir_name(step) and not folder.is_symlink() and saved_step(folder) in (step, None)


def is_removable(folder: Path) -> bool:
    """True for a checkpoint under its original name, without files that a user added. Nothing else is ever deleted."""
    if not _has_original_name(folder):
        return False
    try:
        known = {MANIFEST, *read_json(folder / MANIFEST)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return all(path.relative_to(folder).as_posix() in known or _SYSTEM_FILES.fullmatch(path.name) for path in files)


def remove_checkpoint(folder: Path) -> None:
    removed = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def move_aside(folder: Path) -> None:
    """Free the name of a checkpoint that is about to be saved again.

    A folder with a user's files gets another name for good. Any other is deleted by `remove_replaced` once the new
    checkpoint is complete, or restored by `clean_up_partial`.
    """
    if is_removable(folder):
        replaced = folder.with_name(f"{REPLACED}{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    elif folder.exists() or folder.is_symlink():
        folder.rename(dated_path(folder))


def remove_replaced(folder: Path) -> None:
    """Delete what `move_aside` moved."""
    shutil.rmtree(folder.with_name(f"{REPLACED}{folder.name}"), ignore_errors=True)


def dated_path(path: Path, word: str = "before") -> Path:
    """A free name beside a path, with the time: NAME.before-20261129-120000."""
    path = path.with_name(f"{path.name}.{word}-{time.strftime('%Y%m%d-%H%M%S')}")
    while path.exists() or path.is_symlink():
        path = path.with_name(f"{path.name}-again")
    return path


def clean_up_partial(checkpoints: Path) -> None:
    """Delete what killed saves left, and restore checkpoints that they were about to replace."""
    leftovers = [folder for folder in checkpoints.glob(".*") if _TEMPORARY.fullmatch(folder.name)]
    for replaced in [folder for folder in leftovers if folder.name.startswith(REPLACED)]:
        final = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not final.exists():
            replaced.rename(final)
            fsync_dir(checkpoints)
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)


# -- disk space -------------------------------------------------------------------------------------------------------


def check_space_for_save(checkpoints: Path, step: int, tensor_bytes: int) -> None:
    """
    Raises:
        UserError: one more checkpoint does not fit on the disk.
    """
    need, free = tensor_bytes + SPARE_BYTES, free_bytes(checkpoints)
    if need > free:
        raise UserError(
            f"no space to save step {step:,} in {checkpoints}: it needs {format_bytes(need)}, the disk has "
            f"{format_bytes(free)} free; older checkpoints are untouched. Free some space, or lower train.keep_last, "
            "and run the same command again"
        )


def check_space_for_run(config: RunConfig, checkpoints: Path, best: Path, step: int) -> None:
    """
    Raises:
        UserError: the checkpoints that a run keeps from `step` on do not fit on the disk.
    """
    (need, count), free = remaining_checkpoint_bytes(config, checkpoints, best, step), free_bytes(checkpoints)
    if need > free:
        raise UserError(
            f"the run needs {format_bytes(need)} for {count:,} checkpoint{'s' * (count != 1)} of "
            f"{format_bytes(need / count)} in {checkpoints}, the disk has {format_bytes(free)} free; free some space, "
            f"keep fewer (train.keep_last {config.train.keep_last}, 0 keeps all; train.keep_every_steps "
            f"{config.train.keep_every_steps:,}), or set MYLLM_DATA to a folder on a larger disk"
        )


def remaining_checkpoint_bytes(config: RunConfig, checkpoints: Path, best: Path, step: int) -> tuple[int, int]:
    """Disk space that a run needs for checkpoints from `step` on, in addition to those on the disk.

    Returns:
        bytes, and the number of checkpoints.
    """
    existing = sorted(step_of(folder) for folder in list_checkpoints(checkpoints))
    count = n_added(config, existing, step, has_best=bool(list_checkpoints(best)))
    return count * checkpoint_bytes(config), count
