"""One data set made on several machines: each tokenises a part of the files, one joins them. They never talk.

`work/part-3-of-16/` holds a part's units, and `done.json` once it has them all. Joining is the ordinary preparation,
which finds its units made, so the bytes are those of one machine.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from myllm.config import DataConfig, RunConfig, from_dict
from myllm.data.dataset import SETTINGS, WORK, Dataset
from myllm.distributed.cpu_threads import usable_cores
from myllm.errors import UserError
from myllm.files import read_json, write_json

from .disk_space import check_disk
from .prepare import (
    PART_DONE,
    disk_errors_for_users,
    forget_damaged,
    is_complete,
    open_work,
    prepare,
    resolve,
    worker_pools,
)
from .progress import progress_bar
from .scheduler import WorkScheduler
from .status import preparation_lock
from .work_items import WorkItem, load_item_index, tokens_path


def parse_worker_shard(text: str) -> tuple[int, int]:
    """ "3/16" as (3, 16).

    Raises:
        UserError: anything else.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"the part {text!r} is not one of several: expected such as 3/16, from 1/16 to 16/16")
    return int(part), int(parts)


def items_of_shard(units: Sequence[WorkItem], number: int, parts: int) -> list[int]:
    """The units of one part, by number: files are dealt out in turn, so that the parts go forward together."""
    dealt: dict[str, int] = {}
    for unit in units:
        dealt.setdefault(unit[0].file.name, len(dealt))
    return [at for at, unit in enumerate(units) if dealt[unit[0].file.name] % parts == number - 1]


def prepare_worker_shard(config: DataConfig, part: str, progress: bool = True) -> Path:
    """Tokenise one part of the files, for `seal` to join.

    Returns:
        the part's folder

    Raises:
        UserError: as `prepare`, and a part that is not one.
    """
    number, parts = parse_worker_shard(part)
    recipe = resolve(config)
    work = recipe.folder / WORK / f"part-{number}-of-{parts}"
    units = recipe.units
    mine = items_of_shard(units, number, parts)
    with disk_errors_for_users(), preparation_lock(recipe.folder, f".part-{number}-of-{parts}"):
        with preparation_lock(recipe.folder):  # shared by all parts
            if is_complete(recipe.folder) or (work / PART_DONE).exists():
                return work
            open_work(recipe, work)
        workers = config.workers or usable_cores()
        room = check_disk(recipe, workers, parts)
        if progress:
            tqdm.write(f"preparing part {part} of {recipe.folder.name}: {room}", file=sys.stderr)
        # Where only so much is wanted, a part makes its share of it, and a little more: files differ.
        wanted = None if config.target_tokens is None else 1.05 * (config.target_tokens + config.val_tokens) / parts
        most = None if config.max_documents is None else 1.05 * config.max_documents / parts
        tokens, made, size_bytes = 0, 0, sum(piece.size_bytes for each in mine for piece in units[each])
        with worker_pools(recipe, work, workers) as (pool, downloads), progress_bar(size_bytes, progress) as bar:
            forget_damaged(work, pool)
            job = WorkScheduler(recipe, units, mine, work, pool, downloads, in_flight=2 * workers)
            with job.finished(bar) as finished:
                for each in finished:
                    bar.update(sum(piece.size_bytes for piece in units[each]))
                    tokens += tokens_path(work, each).stat().st_size // 2
                    made += len(load_item_index(work, each).lengths) if most is not None else 0
                    if (wanted is not None and tokens >= wanted) or (most is not None and made >= most):
                        break
        shutil.rmtree(work / "downloads", ignore_errors=True)  # what was fetched ahead, and not needed
        done = {"fingerprint": recipe.fingerprint, "part": number, "of": parts, "tokens": tokens}
        write_json(work / PART_DONE, done)
    return work


def merge_worker_shards(folder: Path, workers: int = 0, progress: bool = True) -> Dataset:
    """Join the parts of a data set.

    Raises:
        UserError: there are none, some are missing, or the source is not what they were made from.
    """
    found = [path for path in (folder / WORK).glob("part-*-of-*") if path.name.rpartition("-")[2].isdecimal()]
    if not found and not is_complete(folder):
        raise UserError(f"{folder} has no parts to join; make them with `myllm data prepare SOURCE --part 1/N` and on")
    for parts in sorted({int(path.name.rpartition("-")[2]) for path in found}):
        names = [f"part-{number}-of-{parts}" for number in range(1, parts + 1)]
        if missing := [name for name in names if not (folder / WORK / name / PART_DONE).exists()]:
            raise UserError(
                f"{folder / WORK} lacks {', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}: prepare "
                "those first, with the same settings; a part made on another machine is copied there as a folder"
            )
    config = settings_of(folder, workers)
    if not is_complete(folder) and resolve(config).folder.resolve() != folder.resolve():
        raise UserError(
            f"{folder} cannot be joined: its source is not what the parts were made from (or MYLLM_DATA is another "
            "folder than it was); put the source back as it was, or prepare it again"
        )
    return prepare(config, progress)


def settings_of(folder: Path, workers: int = 0) -> DataConfig:
    """The settings that a data set was begun with.

    Raises:
        UserError: there are none.
    """
    try:
        values = read_json(folder / SETTINGS)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / SETTINGS}: {error}; prepare the source again") from None
    return from_dict({"data": {**values, "workers": workers}}, RunConfig()).data
