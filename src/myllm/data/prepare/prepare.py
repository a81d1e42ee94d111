"""Text to shards: download, tokenise in parallel processes, hold out validation, write, hash.

    files ─▶ seeded order ─▶ units ─▶ [download] ─▶ [worker: read, tokenise] ─▶ work/000012.bin, .npz ─┐
                                                                                                       ▼
         shards, in their final order ◀─ [worker: copy, hash] ◀─ cut list ◀─ documents in order: val first, then train

Work is cut into units by the source's files alone, and the cut list is made in the units' order, so the bytes do not
depend on the number of workers. A unit, a shard and a download each get their name when they are whole and on the disk:
whatever interrupts a preparation, the next call goes on from there.
"""

import errno
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from myllm import paths
from myllm.config import DataConfig
from myllm.data.dataset import MANIFEST, PROGRESS, SETTINGS, SPANS, TOKENIZER, WORK, Dataset, find_dataset
from myllm.data.sources.hub_listing import UnreachableError
from myllm.data.sources.source import find_source
from myllm.distributed.cpu_threads import usable_cores
from myllm.errors import UserError, explain_os_error, full_disk_path, out_of_space
from myllm.files import TEMP_SUFFIX, atomic_write, fsync_dir, read_json, write_json

from .disk_space import check_disk
from .progress import progress_bar
from .scheduler import Downloads, WorkScheduler
from .shard_plan import NotEnoughText
from .shard_writer import ShardWriter, finished_shards
from .spec import DatasetSpec, estimate_tokens, make_spec
from .status import preparation_lock
from .work_items import init_worker, is_item_intact, tokens_path

PART_DONE = "done.json"
"""In the folder of a part (parts.py) all of whose units are there."""
PATIENCE_S = 10
"""For workers to end by themselves: a batch takes them milliseconds, a document of 64 MB seconds."""


def prepare(config: DataConfig, progress: bool = True) -> Dataset:
    """The data set that the config asks for, made if it is not there yet, or taken up where it was interrupted.

    A second process that asks for the same one waits for the first.

    Raises:
        UserError: bad source, too little text, no room on the disk. What is finished is kept.
    """
    if config.dataset is not None:
        return find_dataset(config.dataset)
    recipe = resolve(config)
    if not is_complete(recipe.folder) or (recipe.folder / WORK).exists():
        with disk_errors_for_users(), preparation_lock(recipe.folder):
            if not is_complete(recipe.folder):  # another process may have made it meanwhile
                try:
                    _build(recipe, config.workers or usable_cores(), progress)
                except NotEnoughText:  # nor will it be another time
                    remove(recipe.folder)
                    raise
            remove_work(recipe.folder)  # here, since an earlier call may have been killed right after the manifest
    return Dataset.open(recipe.folder)


def resolve(config: DataConfig) -> DatasetSpec:
    """What the config asks for, or its fallback where the source cannot be reached."""
    try:
        return make_spec(config)
    except UnreachableError as error:
        if config.fallback is None:
            raise
        find_source(config.fallback, config.text_column)  # says what is wrong with it before it is taken
        tqdm.write(f"{error}\ntaking {config.fallback} instead", file=sys.stderr)
        return make_spec(replace(config, source=config.fallback, fallback=None))


def siblings(recipe: DatasetSpec) -> Iterator[str]:
    """A sentence on each whole data set of the same text and vocabulary, cut in other amounts: it may do as well."""
    wanted = recipe.describe()
    amounts = ("val_tokens", "target_tokens", "max_documents", "shard_tokens", "shuffle_seed")
    for file in sorted(paths.datasets_dir().glob(f"[!.]*/{MANIFEST}")):
        try:
            manifest = Dataset.read(file.parent).manifest
        except UserError:
            continue
        if any(manifest.get(key) != wanted[key] for key in wanted.keys() - {*amounts, "format"}):
            continue
        differs = ", ".join(
            f"{key} {manifest.get(key)} instead of {wanted[key]}" for key in amounts if manifest.get(key) != wanted[key]
        )
        yield (
            f"note: {file.parent.name} has {manifest['counts']['train_tokens']:,} training tokens of the same source "
            f"({differs or 'an earlier format'}); to train on it instead: --data.dataset {file.parent.name}"
        )


def is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


@contextmanager
def disk_errors_for_users() -> Iterator[None]:
    """A full disk or a folder that cannot be written is the user's to mend; any other fault keeps its traceback."""
    try:
        yield
    except OSError as error:
        where = full_disk_path(error, paths.datasets_dir())
        if out_of_space(error) and where is not None and where.is_relative_to(paths.datasets_dir()):
            raise UserError(
                f"no room to write the data set under {paths.datasets_dir()}: {error.strerror}. What is finished is "
                "kept: "
                "free some space and the same command goes on, or set MYLLM_DATA to a folder on a larger disk"
            ) from None
        if said := explain_os_error(error):
            raise UserError(said) from None
        if error.errno == errno.ENOENT:
            raise UserError(
                f"cannot find {error.filename or paths.datasets_dir()}: {error.strerror}; start it again, and "
                "set MYLLM_DATA to another folder if it leads nowhere"
            ) from None
        raise


def _build(recipe: DatasetSpec, workers: int, progress: bool) -> None:
    folder, work = recipe.folder, recipe.folder / WORK
    open_work(recipe, work)
    go_on_from(recipe, work)
    room = check_disk(recipe, workers)
    if progress:
        tqdm.write(f"preparing {folder.name}: {room}", file=sys.stderr)
        if note := recipe.source.ignored_note:
            tqdm.write(note, file=sys.stderr)
        for note in siblings(recipe):
            tqdm.write(note, file=sys.stderr)
    adopt_parts(recipe, work)
    units = recipe.units
    with worker_pools(recipe, work, workers) as (pool, downloads), progress_bar(_size(recipe), progress) as bar:
        forget_damaged(work, pool)
        assembly = ShardWriter(recipe, folder, work, pool)
        # Shards that are written meanwhile go on the list at once: training may be waiting for them.
        job = WorkScheduler(recipe, units, range(len(units)), work, pool, downloads, 2 * workers, assembly.settle)
        with job.finished(bar) as finished:
            for number in finished:
                size_bytes = sum(piece.size_bytes for piece in units[number])
                assembly.add(number, size_bytes)
                bar.set_postfix_str(f"{assembly.cuts.counts['train_tokens'] / 1e6:,.1f}M tokens", refresh=False)
                bar.update(size_bytes)
                if assembly.cuts.full:
                    break
        assembly.finish()


def remove_work(folder: Path) -> None:
    """Delete what a data set that is whole was made from. No worker writes there any more."""
    (folder / PROGRESS).unlink(missing_ok=True)
    for left in folder.glob(f".*{TEMP_SUFFIX}"):
        left.unlink(missing_ok=True)
    if (folder / WORK).exists():  # last: as long as it is there, the next call comes here again
        shutil.rmtree(folder / WORK)


def remove(folder: Path) -> None:
    """Delete what preparation wrote into a data set's folder, and the folder unless something else is there."""
    own = {MANIFEST, PROGRESS, SETTINGS, TOKENIZER, SPANS}
    for path in list(folder.iterdir()):
        if path.name == WORK:
            shutil.rmtree(path)
        elif path.name in own or re.fullmatch(r"(train|val)_\d+\.npy|\..*\.tmp", path.name):
            path.unlink()
    with suppress(OSError):  # not empty
        folder.rmdir()


def open_work(recipe: DatasetSpec, work: Path) -> None:
    """Make the folders of a data set and of its units, rid of what cannot be gone on from."""
    folder = recipe.folder
    if folder.exists() and not (folder / WORK).exists():  # what someone's `rm -r` did not get to
        remove(folder)
    work.mkdir(parents=True, exist_ok=True)
    for left in work.glob(f".*{TEMP_SUFFIX}"):
        left.unlink(missing_ok=True)
    write_json(folder / SETTINGS, recipe.settings())
    if not recipe.tokenizer.is_default:  # in one step: training that goes on meanwhile reads it
        with atomic_write(folder / TOKENIZER) as file:
            file.write(recipe.tokenizer.file.read_bytes())
    fsync_dir(folder)


def go_on_from(recipe: DatasetSpec, work: Path) -> None:
    """Forget what an interrupted call cannot have finished."""
    folder = recipe.folder
    for left in folder.glob(f".*{TEMP_SUFFIX}"):
        left.unlink(missing_ok=True)
    if not finished_shards(folder, recipe.fingerprint):
        (folder / PROGRESS).unlink(missing_ok=True)
        for index in work.glob("*.npz"):  # of tokens that went into shards which are no longer there
            if not index.with_suffix(".bin").exists():
                index.unlink()


def adopt_parts(recipe: DatasetSpec, work: Path) -> None:
    """Take over the units that finished parts left.

    Raises:
        UserError: a part was made with other settings, from other text, or its folder was not copied whole.
    """
    for done in sorted(work.glob(f"part-*/{PART_DONE}")):
        try:
            made_for = read_json(done).get("fingerprint")
        except UserError:
            made_for = None
        if made_for != recipe.fingerprint:
            raise UserError(
                f"{done.parent} is no part of {recipe.folder.name}: it was made with other settings or from other "
                "text; delete it, and prepare that part again with the same settings"
            )
        for path in sorted(done.parent.glob("[0-9]*")):  # .bin before .npz, which says that both are there
            path.rename(work / path.name)


def forget_damaged(work: Path, pool: Executor) -> None:
    """Delete the units of an earlier call, or of another machine, that did not reach this disk whole."""
    numbers = [int(index.stem) for index in sorted(work.glob("[0-9]*.npz"))]
    for number, intact in zip(numbers, pool.map(is_item_intact, repeat(work), numbers), strict=True):
        if not intact:
            tokens_path(work, number).with_suffix(".npz").unlink()
            tokens_path(work, number).unlink(missing_ok=True)


@contextmanager
def worker_pools(recipe: DatasetSpec, work: Path, workers: int) -> Iterator[tuple[ProcessPoolExecutor, Downloads]]:
    """Processes that tokenise, and others that download where there is something to download."""
    # spawn: a forked child would inherit the parent's threads' locks.
    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=init_worker)
    remote = any(file.remote for file in recipe.source.files)
    fetchers = min(8, 2 + workers // 8)
    fetching = ProcessPoolExecutor(fetchers, mp_context=context, initializer=init_worker) if remote else None
    with pool:
        try:
            yield pool, Downloads(recipe, work, fetching)
        except BrokenProcessPool:
            raise UserError(
                "a worker process died: killed for want of memory (lower data.workers), or called from a script whose "
                "work is not under `if __name__ == '__main__':`"
            ) from None
        finally:
            end_pool(pool, PATIENCE_S)
            if fetching is not None:
                end_pool(fetching, 0)  # a download under way is not worth waiting for: what there is of it is kept


def end_pool(pool: ProcessPoolExecutor, patience_s: float) -> None:
    """Shut a pool down in whatever state it is, and kill the processes that are still there after so long.

    Where a worker was killed, the pool alone might wait for ever: for a process that it had just started, or for one
    that waits for a lock of the dead one.
    """
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    deadline = time.monotonic() + patience_s
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.kill()


def _size(recipe: DatasetSpec) -> int:
    """Bytes of the source that will be read."""
    share = recipe.estimated_tokens / max(estimate_tokens(recipe.source.files), 1)
    return int(recipe.source.size_bytes * min(share, 1))
