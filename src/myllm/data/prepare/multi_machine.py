"""One data set prepared on several machines: each tokenizes one worker shard of the files, and one machine merges them.

`work/shard-3-of-16/` holds the tokens of a worker shard, and `done.json` once they are complete. Merging is the
ordinary preparation, which finds the work items tokenized, so the bytes are those of a single machine.
"""

import math
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from myllm.config import DataConfig
from myllm.data.dataset import WORK, Dataset
from myllm.data.preparation_lock import preparation_lock
from myllm.data.settings import read_settings
from myllm.distributed.cpu_threads import usable_cores
from myllm.errors import UserError
from myllm.files import write_json

from .disk_space import check_disk
from .prepare import disk_errors_for_users, prepare, resolve
from .progress import progress_bar
from .scheduler import WorkScheduler, item_bytes
from .work_dir import DONE, delete_damaged_items, is_complete, open_work_dir
from .work_items import WorkItem, load_item_index
from .workers import start_workers

MARGIN = 1.05
"""A worker shard tokenizes this much more than its share of the target, since files differ."""


def parse_worker_shard(text: str) -> tuple[int, int]:
    """ "3/16" as (3, 16). Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"invalid worker shard {text!r}: expected NUMBER/COUNT, for example 3/16 (from 1/16 to 16/16)")
    return int(found[1]), int(found[2])


def items_of_shard(items: Sequence[WorkItem], number: int, count: int) -> list[int]:
    """The numbers of one worker shard's items. Files are dealt out in turn, so all worker shards progress alike."""
    order: dict[str, int] = {}
    for item in items:
        order.setdefault(item[0].file.name, len(order))
    return [index for index, item in enumerate(items) if order[item[0].file.name] % count == number - 1]


def prepare_worker_shard(config: DataConfig, shard: str, progress: bool = True) -> Path:
    """Tokenize one worker shard, such as "3/16", for `merge_worker_shards`. Returns its folder.

    Raises:
        UserError: as `prepare`, and an invalid worker shard.
    """
    number, count = parse_worker_shard(shard)
    spec = resolve(config)
    name = f"shard-{number}-of-{count}"
    work = spec.folder / WORK / name
    numbers = items_of_shard(spec.work_items, number, count)
    with disk_errors_for_users(), preparation_lock(spec.folder, f".{name}"):
        with preparation_lock(spec.folder):  # other worker shards may be starting, or all may be merged already
            if is_complete(spec.folder) or (work / DONE).exists():
                return work
            open_work_dir(spec, work)
        worker_count = config.workers or usable_cores()
        space = check_disk(spec, worker_count, count)
        if progress:
            tqdm.write(f"preparing worker shard {shard} of {spec.folder.name}: {space}", file=sys.stderr)
        max_tokens = MARGIN * ((config.target_tokens or math.inf) + config.val_tokens) / count
        max_documents = MARGIN * (config.max_documents or math.inf) / count
        tokens = documents = 0
        with (
            start_workers(spec, work, worker_count) as workers,
            progress_bar(item_bytes(spec, numbers), progress) as bar,
        ):
            delete_damaged_items(spec, work, workers.pool)
            with closing(WorkScheduler(spec, work, workers, numbers).run(bar)) as finished:
                for item in finished:
                    lengths = load_item_index(work, item).lengths
                    tokens += int(lengths.sum())
                    documents += len(lengths)
                    if tokens >= max_tokens or documents >= max_documents:
                        break
        shutil.rmtree(work / "downloads", ignore_errors=True)  # downloaded ahead, and not needed
        write_json(work / DONE, {"fingerprint": spec.fingerprint, "shard": number, "of": count, "tokens": tokens})
    return work


def merge_worker_shards(folder: Path, workers: int = 0, progress: bool = True) -> Dataset:
    """Merge the worker shards of a data set.

    Raises:
        UserError: there are none, some are missing, or the source has changed since they were prepared.
    """
    found = [path for path in (folder / WORK).glob("*-of-*") if path.name.rpartition("-")[2].isdecimal()]
    if not found and not is_complete(folder):
        raise UserError(
            f"{folder} has no worker shards to merge; prepare them with `myllm data prepare SOURCE --shard 1/N`, 2/N, "
            "... N/N"
        )
    for count in sorted({int(path.name.rpartition("-")[2]) for path in found}):
        missing = [
            f"shard-{number}-of-{count}"
            for number in range(1, count + 1)
            if not any((folder / WORK).glob(f"*-{number}-of-{count}/{DONE}"))
        ]
        if missing:
            raise UserError(
                f"{folder / WORK} lacks {', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}: prepare "
                "those first with the same settings; copy the folder of a worker shard from another machine there"
            )
    config = read_settings(folder, workers)
    if not is_complete(folder) and resolve(config).folder.resolve() != folder.resolve():
        raise UserError(
            f"cannot merge {folder}: the source is not what the worker shards were prepared from (or MYLLM_DATA is "
            "another folder than it was); restore the source, or prepare it again"
        )
    return prepare(config, progress)
