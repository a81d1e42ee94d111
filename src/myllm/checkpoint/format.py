"""Write and read checkpoints. A folder gets its final name only when it is complete, flushed and hashed.

`checkpoints/step_00000100/` holds the state after 100 steps:

    weights/          by name, float32, without wrapper prefixes; each rank writes its share to a file of its own
    optimizer/        AdamW's state: NAME.exp_avg, NAME.exp_avg_sq and NAME.step; Muon's: NAME.momentum_buffer
    random/           state of the random number generators of every rank
    state.json        TrainState: step, tokens, data position, early stopping, skipped steps
    config.json       config of the run
    tokenizer.json    the tokenizer, if it is not GPT-2's
    manifest.json     size and sha256 of each of these; written last

A save writes to a temporary folder, flushes it, and renames it. A load takes the newest checkpoint that matches its
manifest. docs/checkpoint_format.md describes the files.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from myllm.distributed.collectives import broadcast_object, group_rank, run_on_all_ranks
from myllm.errors import UserError, out_of_space
from myllm.files import add_filename, file_sha256, fsync_dir, read_json, write_json, write_text
from myllm.migrations import STATE

from .dcp import read_tensors, unflatten_moments, write_tensors
from .integrity import HASH_ALL, iter_intact, raise_if_damaged, verify_on_all_ranks
from .layout import (
    CONFIG_FILE,
    FORMAT,
    MANIFEST,
    METADATA,
    OPTIMIZER,
    RANDOM,
    STATE_FILE,
    TOKENIZER,
    WEIGHTS,
    checkpoint_dir,
    list_checkpoints,
)
from .retention import KEEP_ALL, PARTIAL, RetentionPolicy, move_aside, remove_checkpoint, remove_replaced
from .state import TrainState, read_state


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint, in host memory that training does not change."""

    state: TrainState
    config: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """By NAME.exp_avg and so on."""
    random: dict[int, dict[str, Tensor]]
    """`get_rng_state` by rank."""
    tokenizer_file: Path | None = None
    """None: GPT-2's tokenizer."""


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint. Tensors are read at first use, unsharded, to the CPU."""

    folder: Path
    state: TrainState
    config: dict[str, Any]
    tokenizer_file: Path | None
    """None: GPT-2's tokenizer."""

    @cached_property
    def model(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / WEIGHTS)

    @cached_property
    def optimizer(self) -> dict[str, dict[str, Tensor]]:
        return unflatten_moments(read_tensors(self.folder / OPTIMIZER))

    @cached_property
    def random(self) -> list[dict[str, Tensor]]:
        """By rank."""
        files = sorted((self.folder / RANDOM).glob("rank_*.pt"))
        return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


# -- writing ----------------------------------------------------------------------------------------------------------


def write_checkpoint(
    checkpoints: Path, snapshot: Snapshot, keep: RetentionPolicy = KEEP_ALL, group: dist.ProcessGroup | None = None
) -> Path:
    """Write one checkpoint on all ranks of a group, then delete those that need not be kept.

    Raises:
        UserError: the disk is full, or the ranks do not share a file system. Older checkpoints are untouched.
    """
    final = checkpoint_dir(checkpoints, snapshot.state.step)
    work = checkpoints / f"{PARTIAL}{final.name}"
    first = group_rank(group) == 0
    try:
        run_on_all_ranks(lambda: _make_work_dir(work) if first else None, group)
        write_tensors(work / WEIGHTS, snapshot.weights, group)
        write_tensors(work / OPTIMIZER, snapshot.optimizer, group)
        by_rank = run_on_all_ranks(lambda: _write_rank_files(work, snapshot, group_rank(group)), group)
        run_on_all_ranks(lambda: _finalize(work, final, by_rank, keep) if first else None, group)
    except (OSError, RuntimeError) as error:
        if not out_of_space(error):
            raise
        raise UserError(
            f"no space to save step {snapshot.state.step:,} in {checkpoints}: the disk is full; older checkpoints are "
            "untouched. Free some space and run the same command again"
        ) from None
    finally:
        if first:
            shutil.rmtree(work, ignore_errors=True)
    return final


def _make_work_dir(work: Path) -> None:
    work.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    for folder in (WEIGHTS, OPTIMIZER, RANDOM):
        (work / folder).mkdir(parents=True)


def _write_rank_files(work: Path, snapshot: Snapshot, rank: int) -> dict[str, Any]:
    """Write the random state and, on rank 0, everything that is not a tensor.

    Returns:
        the manifest's entries of all files that this rank wrote.
    """
    files = list(work.glob(f"*/__{rank}_*"))
    for number, state in snapshot.random.items():
        files.append(work / RANDOM / f"rank_{number:05d}.pt")
        _write_pickle(files[-1], state)
    if rank == 0:
        write_json(work / STATE_FILE, STATE.stamp(asdict(snapshot.state)))
        write_json(work / CONFIG_FILE, snapshot.config)
        if snapshot.tokenizer_file:
            write_text(work / TOKENIZER, snapshot.tokenizer_file.read_bytes().decode("utf-8"))
        files += [path for path in work.iterdir() if path.is_file()]
        files += [work / folder / METADATA for folder in (WEIGHTS, OPTIMIZER)]
    return {
        path.relative_to(work).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }


def _finalize(work: Path, final: Path, by_rank: list[dict[str, Any]], keep: RetentionPolicy) -> None:
    """Write the manifest, then rename the folder. Runs on rank 0, when the files of all ranks are on the disk."""
    files = {name: entry for entries in by_rank for name, entry in sorted(entries.items())}
    visible = {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()}
    if missing := sorted(files.keys() - visible):
        raise UserError(
            f"rank 0 cannot see {', '.join(missing[:3])} of {final}, which other ranks have written; the run folder "
            "must be on a file system that all machines share: set MYLLM_DATA to one"
        )
    write_json(work / MANIFEST, {"format": FORMAT, "files": files})
    for folder in (*(path for path in work.iterdir() if path.is_dir()), work):
        fsync_dir(folder)
    move_aside(final)  # exists if it was damaged, so that training resumed from an older one and reached it again
    work.rename(final)
    fsync_dir(final.parent)
    remove_replaced(final)
    for old in keep.to_delete(final):
        remove_checkpoint(old)


def _write_pickle(path: Path, content: Any) -> None:
    # Through a Python file: if the write fails, the context of torch's RuntimeError is then the OSError.
    with add_filename(path), path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


# -- reading ----------------------------------------------------------------------------------------------------------


def load_latest(checkpoints: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """Load the newest intact checkpoint, on all ranks. Returns None if there are none; logs why any was skipped.

    Rank 0 lists the checkpoints, and each rank hashes a share of the files.

    Raises:
        UserError: all checkpoints are damaged. The user decides whether to start over.
    """
    folders = broadcast_object(list_checkpoints(checkpoints))
    intact = next(iter_intact(folders, log, verify_on_all_ranks), None)
    if intact:
        return open_checkpoint(intact)
    if folders:
        raise UserError(
            f"no checkpoint in {checkpoints} is intact; restore one, or start over with --train.fresh (the old run is "
            "moved aside)"
        )
    return None


def load_checkpoint(folder: Path, hashed: tuple[str, ...] = HASH_ALL) -> Checkpoint:
    """Load one checkpoint, whatever the name of its folder. Only tensors and plain values are read; no code runs.

    Args:
        hashed: as in `verify_checkpoint`; HASH_MODEL is enough to read only the model.

    Raises:
        DamagedCheckpoint: it does not match its manifest, or is not a checkpoint.
        UserError: it was written by a later version of this program.
    """
    raise_if_damaged(folder, hashed, check_name=False)
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint that has been verified."""
    tokenizer = folder / TOKENIZER
    return Checkpoint(
        folder, read_state(folder), read_json(folder / CONFIG_FILE), tokenizer if tokenizer.is_file() else None
    )
