"""Prepared data sets and the runs that use them: `myllm data list --local` and `myllm data delete`."""

from pathlib import Path

import tyro

from myllm import paths
from myllm.errors import UserError
from myllm.files import file_lock, folder_bytes, fsync_dir, temporary_dir
from myllm.formatting import format_bytes, format_names, format_si, format_table

from .command import confirm

TITLES = ("name", "tokens", "validation", "size", "state", "used by")
SHOWN_RUNS = 3


def describe_datasets() -> str:
    """A table of the data sets under temp_data/datasets."""
    from myllm.data.dataset import MANIFEST, SETTINGS
    from myllm.runs.catalog import runs_by_dataset

    root = paths.datasets_dir()
    folders = sorted({path.parent for name in (SETTINGS, MANIFEST) for path in root.glob(f"[!.]*/{name}")})
    if not folders:
        return f"no prepared data sets yet under {root}"
    users = runs_by_dataset()
    rows, sizes = [TITLES], [folder_bytes(folder) for folder in folders]
    for folder, size in zip(folders, sizes, strict=True):
        tokens, validation, state = _measure(folder)
        runs = format_names(users.get(folder.name, []), SHOWN_RUNS)
        rows.append((folder.name, tokens, validation, format_bytes(size), state, runs))
    total = f"{len(folders)} data set{'s' if len(folders) > 1 else ''}, {format_bytes(sum(sizes))}, under {root}"
    if any(row[4] == "incomplete" for row in rows):
        total += "; run the same command to complete one"
    return f"{format_table(rows, right=range(1, 4))}\n\n{total}"


def _measure(folder: Path) -> tuple[str, str, str]:
    """Training tokens, validation tokens, and a word for the state."""
    from myllm.data.dataset import MANIFEST, PROGRESS, Dataset
    from myllm.data.preparation_lock import is_being_prepared

    state = "being prepared" if is_being_prepared(folder) else "incomplete"
    if not any((folder / name).exists() for name in (MANIFEST, PROGRESS)):
        return "-", "-", state
    try:
        dataset = Dataset.open(folder, allow_incomplete=True)
    except UserError:
        return "-", "-", "damaged"
    tokens = format_si(dataset.train.tokens), format_si(dataset.val.tokens)
    return *tokens, "complete" if dataset.complete else state


def delete(name: tyro.conf.Positional[str], yes: bool = False) -> None:
    """Delete a prepared data set.

    Args:
        name: under temp_data/datasets.
        yes: don't ask.
    """
    from myllm.data.preparation_lock import is_being_prepared, lock_path
    from myllm.runs.catalog import runs_by_dataset, state_of
    from myllm.runs.lifecycle import find_own_folder

    folder = find_own_folder("data set", paths.datasets_dir(), name)
    users = runs_by_dataset().get(name, [])
    if running := [run for run in users if state_of(paths.RunPaths.of(run)) == "running"]:
        raise UserError(f"{name} is in use by {', '.join(running)}; stop the training first")
    size = format_bytes(folder_bytes(folder))
    print(f"{folder}: {size}, used by {format_names(users, SHOWN_RUNS) or 'no run'}")
    if users:
        print(
            "A run needs its data set to resume, and to be evaluated on it; the same text prepares the same one again."
        )
    confirm(f"Delete this data set, {size}?", yes)
    try:
        if is_being_prepared(folder):
            raise BlockingIOError
        with file_lock(lock_path(folder), wait=False), temporary_dir(folder) as temporary:
            folder.rename(temporary / name)  # temporary_dir removes it at the end, with everything in it
            fsync_dir(folder.parent)
    except BlockingIOError:
        raise UserError(f"{folder} is being prepared; stop the preparation first") from None
    lock_path(folder).unlink(missing_ok=True)
    print(f"deleted {name}, {size}")
