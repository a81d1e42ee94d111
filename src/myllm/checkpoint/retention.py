"""Which checkpoints are kept, and how the others go: out of their final name first, then from the disk."""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.files import fsync_dir, read_json
from myllm.formatting import format_bytes
from myllm.planning.disk import SPARE_BYTES, checkpoint_bytes, n_added

MANIFEST, STATE_FILE = "manifest.json", "state.json"
PARTIAL, REMOVED, REPLACED = ".partial-", ".removed-", ".replaced-"
_STEP = re.compile(r"step_([0-9]+)")
_UNFINISHED = re.compile(rf"({re.escape(PARTIAL)}|{re.escape(REMOVED)}|{re.escape(REPLACED)})step_[0-9]+")
_DEBRIS = re.compile(r"\.DS_Store|\._.*|\.nfs.*")
"""Files that file managers and network disks leave in every folder."""


@dataclass(frozen=True)
class RetentionPolicy:
    """What is kept when a new checkpoint is whole."""

    last: int = 0
    """The newest so many (0: all)."""
    every_steps: int = 0
    """Those at multiples of this for ever, beyond the newest (0: none)."""
    alone: bool = False
    """Nothing but the new one."""

    def surplus(self, new: Path) -> list[Path]:
        """Those beside `new` that may go."""
        if not self.last:
            return []
        # Newer ones are damaged, or training would have gone on from them: they must not crowd out sound ones.
        older = [folder for folder in list_checkpoints(new.parent) if step_of(folder) <= step_of(new)]
        older = [folder for folder in older if _has_its_own_name(folder)]
        passing = [folder for folder in older[self.last :] if not self._for_ever(step_of(folder))]
        return [folder for folder in passing if is_removable(folder)]

    def _for_ever(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0


KEEP_ALL = RetentionPolicy()


def step_dir_name(step: int) -> str:
    return f"step_{step:08d}"


def is_step_name(name: str) -> bool:
    """Whether a folder's name is that of a checkpoint: `step_` and digits, nothing else."""
    return _STEP.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    """By the name of a checkpoint's folder; 0 where it has another name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else 0


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders that carry a final name, newest first."""
    found = [path for path in checkpoints.glob("step_*") if is_step_name(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name == step_dir_name(step_of(path))), reverse=True)


def saved_step(folder: Path) -> int | None:
    """By the state inside; None where that cannot be read."""
    try:
        step = read_json(folder / STATE_FILE)["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def _has_its_own_name(folder: Path) -> bool:
    """Whether a save gave it this name; a copy of another step, or under a name of its own kind, is somebody's."""
    step = step_of(folder)
    return folder.name == step_dir_name(step) and not folder.is_symlink() and saved_step(folder) in (step, None)


def is_removable(folder: Path) -> bool:
    """Whether a folder is a checkpoint under the name that its save gave it, with nothing in it that somebody else put
    there. Only such folders are ever deleted."""
    if not _has_its_own_name(folder):
        return False
    try:
        known = {MANIFEST, *read_json(folder / MANIFEST)["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return holds_only(folder, known)


def holds_only(folder: Path, known: set[str]) -> bool:
    """Whether there is no file in a folder but those of the known names, relative to it."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return all(path.relative_to(folder).as_posix() in known or _DEBRIS.fullmatch(path.name) for path in files)


def remove_checkpoint(folder: Path) -> None:
    """A process that is killed half-way leaves nothing damaged under a final name."""
    aside = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def remove_other_checkpoints(folder: Path) -> None:
    """Leave one checkpoint alone in its folder, but for what is somebody's own."""
    for other in list_checkpoints(folder.parent):
        if other != folder and is_removable(other):
            remove_checkpoint(other)


def move_aside(folder: Path) -> None:
    """Make room for a checkpoint of the same step. `remove_unfinished` brings it back if none comes. What is no
    checkpoint of that step, or holds something else besides, gets another name for good."""
    if is_removable(folder):
        aside = folder.with_name(f"{REPLACED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    elif folder.exists() or folder.is_symlink():
        folder.rename(unused_path(folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")))


def unused_path(path: Path) -> Path:
    """The path, or one like it where there is something already."""
    while path.exists() or path.is_symlink():  # twice within a second
        path = path.with_name(f"{path.name}-again")
    return path


def remove_replaced(folder: Path) -> None:
    """What `set_aside` moved, now that the new one has its name."""
    shutil.rmtree(folder.with_name(f"{REPLACED}{folder.name}"), ignore_errors=True)


def clean_up_partial(checkpoints: Path) -> None:
    """Remove what killed saves left behind, and bring back what one was about to replace."""
    left = [folder for folder in checkpoints.glob(".*") if _UNFINISHED.fullmatch(folder.name)]
    for aside in [folder for folder in left if folder.name.startswith(REPLACED)]:
        final = aside.with_name(aside.name.removeprefix(REPLACED))
        if not final.exists():
            aside.rename(final)
            fsync_dir(checkpoints)
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)


# -- room on the disk -------------------------------------------------------------------------------------------------


def save_due(config: RunConfig, step: int, ending: bool) -> bool:
    return step > 0 and (ending or any(step % every == 0 for every in _cadences(config)))


def check_space_for_save(checkpoints: Path, step: int, need_bytes: int) -> None:
    """
    Raises:
        UserError: one more checkpoint does not fit on the disk.
    """
    free = _free_bytes(checkpoints)
    if need_bytes + SPARE_BYTES > free:
        raise UserError(
            f"no room to save step {step:,} in {checkpoints}: it needs {format_bytes(need_bytes + SPARE_BYTES)}, the "
            "disk has "
            f"{format_bytes(free)} free; older checkpoints are untouched. Free some space, or lower train.keep_last, "
            "and start "
            "the same command again"
        )


def remaining_checkpoint_bytes(config: RunConfig, checkpoints: Path, best: Path, step: int) -> tuple[int, int]:
    """Disk space that a run needs for checkpoints from `step` on, in addition to those on the disk.

    Returns:
        bytes, and the number of checkpoints.
    """
    existing = sorted(step_of(folder) for folder in list_checkpoints(checkpoints))
    count = n_added(config, existing, step, has_best=bool(list_checkpoints(best)))
    return count * checkpoint_bytes(config), count


def check_space_for_run(config: RunConfig, checkpoints: Path, best: Path, step: int) -> None:
    """
    Raises:
        UserError: the checkpoints that a run will keep do not fit on the disk.
    """
    (need, count), free = remaining_checkpoint_bytes(config, checkpoints, best, step), _free_bytes(checkpoints)
    if need > free:
        raise UserError(
            f"the run needs {format_bytes(need)} for {count:,} checkpoint{'s' * (count != 1)} of "
            f"{format_bytes(need / count)} in "
            f"{checkpoints}, the disk has {format_bytes(free)} free; free some space, keep fewer (train.keep_last "
            f"{config.train.keep_last}, 0 keeps all; train.keep_every_steps {config.train.keep_every_steps:,}), or set "
            "MYLLM_DATA to a folder on a larger disk"
        )


def _cadences(config: RunConfig) -> list[int]:
    return [every for every in (config.train.save_every_steps, config.train.keep_every_steps) if every > 0]


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
