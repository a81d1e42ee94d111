"""At the start of a run: get the newest whole checkpoint of the mirror if this machine has none that is as new."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from myllm.checkpoint.integrity import HASH_ALL, HASH_NONE, content_errors, iter_intact, verify_checkpoint
from myllm.checkpoint.layout import checkpoint_dir, list_checkpoints, saved_step, step_dir_name, step_of
from myllm.checkpoint.retention import PARTIAL, check_space_for_save, move_aside, remove_replaced
from myllm.config import RunConfig
from myllm.distributed import launcher as ranks
from myllm.errors import UserError
from myllm.files import file_lock, fsync_dir, is_locked
from myllm.formatting import format_bytes
from myllm.paths import RunPaths

from .store import MirrorStore, describe

LOCK = ".mirror.lock"


def fetch_from_mirror(config: RunConfig, log: Callable[[str], None] = print) -> None:
    """Make the newest whole checkpoint of `checkpoint.mirror` this run's newest, if it is newer than those on the disk.

    All ranks may call this: the first one fetches, and the others wait for it.

    Raises:
        UserError: the mirror cannot be read and this machine has no checkpoint of the run, so that it would start over;
            no checkpoint of the mirror is intact; or `train.fresh`, and the mirror holds an older run.
    """
    run, url = RunPaths.of(config.name), config.checkpoint.mirror
    assert url is not None
    store = MirrorStore(url, run)
    if config.train.fresh and not ranks.is_restart():
        _check_empty(store)
        return
    run.root.mkdir(parents=True, exist_ok=True)
    with file_lock(run.root / LOCK):
        if is_locked(run.root / ".lock"):
            return  # a process trains there already; this one will be refused, or is a slow rank of it
        newest = _newest_intact(run.checkpoints, log)
        try:
            if not _fetch_newer(store, "checkpoints", run.checkpoints, newest, log):
                return
            _fetch_newer(store, "best", run.best, _newest_intact(run.best, log), log)
        except UserError:
            raise
        except Exception as error:
            problem = f"the mirror {store.url} cannot be read: {describe(error)}"
            if newest is None:
                raise UserError(
                    f"{problem}. This machine has no checkpoint of the run, which would start over; make the mirror "
                    "readable and run the same command again, or start without --checkpoint.mirror"
                ) from None
            log(f"{problem}; the run resumes from its own checkpoints")


def _check_empty(store: MirrorStore) -> None:
    try:
        empty = store.is_empty()
    except Exception as error:
        raise UserError(f"the mirror {store.url} cannot be read: {describe(error)}") from None
    if not empty:
        raise UserError(
            f"--train.fresh would mix two runs in the mirror: {store.url} holds an older one. Move or delete it there, "
            "or give this run another --name"
        )


def _newest_intact(checkpoints: Path, log: Callable[[str], None]) -> int | None:
    # Hashing takes seconds, so one rank does it for all.
    hashed = HASH_ALL if ranks.rank() == 0 else HASH_NONE
    for folder in iter_intact(list_checkpoints(checkpoints), log, lambda path: verify_checkpoint(path, hashed)):
        return step_of(folder)
    return None


def _fetch_newer(
    store: MirrorStore, kind: str, checkpoints: Path, newest: int | None, log: Callable[[str], None]
) -> bool:
    """Fetch the newest whole and intact checkpoint after step `newest`. False if there is none."""
    mirrored = store.checkpoints(kind)
    whole = {step: manifest for step, manifest in mirrored.items() if manifest and (newest is None or step > newest)}
    for step, manifest in whole.items():
        problem = _fetch(store, kind, checkpoints, step, manifest, log)
        if problem is None:
            return True
        log(f"skipping step {step:,} of the mirror {store.url}: {problem}")
    if newest is None and whole and kind == "checkpoints":
        raise UserError(
            f"no checkpoint in the mirror {store.url} is intact, and this machine has none; restore one, or delete the "
            "mirrored run to start over"
        )
    if newest is None and mirrored:
        log(f"the mirror {store.url}/{kind} holds nothing that was copied completely")
    return False


def _fetch(
    store: MirrorStore, kind: str, checkpoints: Path, step: int, manifest: dict[str, Any], log: Callable[[str], None]
) -> str | None:
    """Fetch one checkpoint under a temporary name, verify it, and rename it. Returns what is wrong with it, or None."""
    n_bytes = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    checkpoints.mkdir(parents=True, exist_ok=True)
    check_space_for_save(checkpoints, step, n_bytes)
    log(f"fetching step {step:,} from the mirror {store.url}/{kind} ({format_bytes(n_bytes)})")
    work, final = checkpoints / f"{PARTIAL}{step_dir_name(step)}", checkpoint_dir(checkpoints, step)
    shutil.rmtree(work, ignore_errors=True)
    try:
        store.fetch(kind, step, manifest, work)
        errors = list(content_errors(work, HASH_ALL))
        if not errors and saved_step(work) != step:
            errors = [f"it contains step {saved_step(work)}"]
        if errors:
            return "; ".join(errors)
        store.fetch_run_files()
        move_aside(final)
        work.rename(final)
        fsync_dir(checkpoints)
        remove_replaced(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return None
