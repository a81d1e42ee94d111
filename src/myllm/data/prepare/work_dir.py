"""The folders of an unfinished preparation: open them, continue from what they hold, and remove them.

A data set's folder has a `work` folder until it is complete. In it are the tokens of finished work items, downloads,
and the folders of worker shards that other machines prepared (multi_machine.py).
"""

import re
import shutil
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from pathlib import Path

from myllm.data.dataset import MANIFEST, PROGRESS, SETTINGS, SPANS, TOKENIZER, WORK
from myllm.errors import UserError
from myllm.files import TEMP_SUFFIX, atomic_write, fsync_dir, read_json, write_json

from .shard_writer import finished_shards
from .spec import DatasetSpec
from .work_items import is_item_intact, tokens_path

DONE = "done.json"
"""In the folder of a worker shard whose work items are all tokenized."""


def is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def open_work_dir(spec: DatasetSpec, work: Path) -> None:
    """Create the folders of a data set and of its tokens, and delete what cannot be continued from."""
    folder = spec.folder
    if folder.exists() and not (folder / WORK).exists():  # partly deleted by hand
        remove_dataset(folder)
    work.mkdir(parents=True, exist_ok=True)
    _delete_temporary_files(work)
    write_json(folder / SETTINGS, spec.settings())
    if not spec.tokenizer.is_default:  # atomically, since training may be reading it
        with atomic_write(folder / TOKENIZER) as file:
            file.write(spec.tokenizer.file.read_bytes())
    fsync_dir(folder)


def delete_unfinished(spec: DatasetSpec, work: Path) -> None:
    """Delete what an interrupted call did not finish."""
    _delete_temporary_files(spec.folder)
    if not finished_shards(spec):
        (spec.folder / PROGRESS).unlink(missing_ok=True)
        for index in work.glob("*.npz"):  # their tokens were in shards that no longer exist
            if not index.with_suffix(".bin").exists():
                index.unlink()


def delete_damaged_items(spec: DatasetSpec, work: Path, pool: Executor) -> None:
    """Delete the tokens of earlier calls, or of another machine, that did not reach this disk whole."""
    numbers = [int(index.stem) for index in sorted(work.glob("[0-9]*.npz"))]
    found = pool.map(partial(is_item_intact, work, spec.tokenizer.dtype.itemsize), numbers)
    for number, intact in zip(numbers, found, strict=True):
        if not intact:
            tokens_path(work, number).with_suffix(".npz").unlink()
            tokens_path(work, number).unlink(missing_ok=True)


def adopt_worker_shards(spec: DatasetSpec, work: Path) -> None:
    """Move the tokens of finished worker shards into the work folder.

    Raises:
        UserError: a worker shard has other settings or other text, or its folder was not copied completely.
    """
    for done in sorted(work.glob(f"*-of-*/{DONE}")):
        try:
            fingerprint = read_json(done).get("fingerprint")
        except UserError:
            fingerprint = None
        if fingerprint != spec.fingerprint:
            raise UserError(
                f"{done.parent} does not belong to {spec.folder.name}: it was prepared with other settings or from "
                "other text; delete it, and prepare that worker shard again with the same settings"
            )
        for path in sorted(done.parent.glob("[0-9]*")):  # .bin before .npz, which marks both as finished
            path.rename(work / path.name)


def remove_work_dir(folder: Path) -> None:
    """Delete what a complete data set was prepared from. No worker writes there any more."""
    (folder / PROGRESS).unlink(missing_ok=True)
    _delete_temporary_files(folder)
    if (folder / WORK).exists():  # last: while it exists, the next call cleans up again
        shutil.rmtree(folder / WORK)


def remove_dataset(folder: Path) -> None:
    """Delete what preparation wrote into a data set's folder, and the folder if nothing else is in it."""
    own_names = {MANIFEST, PROGRESS, SETTINGS, TOKENIZER, SPANS}
    for path in list(folder.iterdir()):
        if path.name == WORK:
            shutil.rmtree(path)
        elif path.name in own_names or re.fullmatch(r"(train|val)_\d+\.npy|\..*\.tmp", path.name):
            path.unlink()
    with suppress(OSError):  # not empty
        folder.rmdir()


def _delete_temporary_files(folder: Path) -> None:
    for path in folder.glob(f".*{TEMP_SUFFIX}"):
        path.unlink(missing_ok=True)
