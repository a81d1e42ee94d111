"""Shards that were damaged, made anew from the source: only those, and byte for byte."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from myllm.data.dataset import FORMAT, SPANS, TOKENIZER, Dataset
from myllm.distributed.cpu_threads import usable_cores
from myllm.errors import UserError

from .multi_machine import settings_of
from .prepare import disk_errors_for_users, worker_pools
from .progress import progress_bar
from .scheduler import WorkScheduler
from .shard_writer import write_shard
from .spec import DatasetSpec, make_spec
from .status import preparation_lock
from .work_items import tokens_path


def repair(dataset: Dataset, damaged: list[str], workers: int = 0, progress: bool = True) -> None:
    """Make the named shards again and put them in their places.

    Raises:
        UserError: the source has changed, is gone, or no longer gives the same bytes; nothing is replaced then.
    """
    folder = dataset.folder
    recipe = _same_recipe(dataset)
    spans = _spans_of(dataset, damaged)
    numbers = sorted({unit for each in spans.values() for unit, _, _ in each})
    units, work = recipe.units, folder / ".repair"
    workers = workers or usable_cores()
    with disk_errors_for_users(), preparation_lock(folder):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            size_bytes = sum(piece.size_bytes for number in numbers for piece in units[number])
            with worker_pools(recipe, work, workers) as (pool, downloads), progress_bar(size_bytes, progress) as bar:
                job = WorkScheduler(recipe, units, numbers, work, pool, downloads, in_flight=2 * workers)
                with job.finished(bar) as finished:
                    for number in finished:
                        bar.update(sum(piece.size_bytes for piece in units[number]))
            for file, each in spans.items():
                digest = write_shard(work / file, [(tokens_path(work, unit), start, end) for unit, start, end in each])
                said = next(shard.sha256 for shard in dataset.shards if shard.file == file)
                if digest != said:
                    raise UserError(
                        f"{file} made again has sha256 {digest[:12]}..., the manifest says {said[:12]}...: a library "
                        f"reads or tokenises otherwise than it did; delete {folder} and prepare it again"
                    )
                (work / file).replace(folder / file)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _same_recipe(dataset: Dataset) -> DatasetSpec:
    config = settings_of(dataset.folder)
    own = dataset.folder / TOKENIZER
    recipe = make_spec(replace(config, tokenizer=str(own)) if own.exists() else config)
    # Which documents went where, spans.npy says: an older version's way of choosing them is not needed here.
    how = {"format", "val_tokens"} if dataset.manifest["format"] != FORMAT else set()
    changed = [key for key, value in recipe.describe().items() if dataset.manifest.get(key) != value and key not in how]
    if changed:
        raise UserError(
            f"{dataset.folder} cannot be repaired: {', '.join(changed)} is not what it was made from. Put the source "
            "back as it was, or delete the folder and prepare it again"
        )
    return recipe


def _spans_of(dataset: Dataset, damaged: list[str]) -> dict[str, list[tuple[int, int, int]]]:
    """Which tokens of which units the named shards hold."""
    path: Path = dataset.folder / SPANS
    try:
        rows = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot repair without {path}, which says what each shard holds ({error}); "
            f"delete {dataset.folder} and prepare it again"
        ) from None
    wanted = {number: shard.file for number, shard in enumerate(dataset.shards) if shard.file in damaged}
    found: dict[str, list[tuple[int, int, int]]] = {file: [] for file in wanted.values()}
    for shard, unit, start, end in rows[np.isin(rows[:, 0], list(wanted))].tolist():
        found[wanted[shard]].append((unit, start, end))
    return found
