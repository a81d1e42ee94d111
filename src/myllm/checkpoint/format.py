"""Checkpoints: whole, checked, and never under their final name before they are both.

`checkpoints/step_00000100/` holds the state after 100 updates:

    weights/          by name, float32, without any wrapper's prefix; each rank's share in a file of its own
    optimizer/        AdamW's moments, by NAME.exp_avg, NAME.exp_avg_sq and NAME.step
    random/           random state of every rank, for dropout
    state.json        TrainState: step, tokens, data position, early stopping
    config.json       the run's config
    tokenizer.json    the vocabulary, where it is not the one that ships with the code
    manifest.json     sha256 and size of each of these; written last

A save goes to a temporary folder, is flushed to the disk, and is renamed. A load takes the newest checkpoint whose
files are what its manifest says and falls back to older ones. docs/checkpoint_format.md describes the files.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from myllm.distributed import collectives as distributed
from myllm.errors import UserError, out_of_space
from myllm.files import add_filename, file_sha256, fsync_dir, read_json, write_json, write_text
from myllm.migrations import STATE

from .dcp import METADATA, read_tensors, strip_wrapper_prefixes, write_tensors
from .integrity import (
    FORMAT,
    HASH_ALL,
    HASH_MODEL,
    OPTIMIZER,
    RANDOM,
    TOKENIZER,
    WEIGHTS,
    DamagedCheckpoint,
    content_faults,
    iter_intact,
    verify_checkpoint,
    verify_on_all_ranks,
)
from .retention import (
    KEEP_ALL,
    MANIFEST,
    RetentionPolicy,
    list_checkpoints,
    move_aside,
    remove_checkpoint,
    remove_other_checkpoints,
    remove_replaced,
    step_dir_name,
)
from .state import TrainState, read_state


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of what a checkpoint will hold, in host memory: nothing that training goes on to change."""

    state: TrainState
    config: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """By NAME.exp_avg and so on."""
    random: dict[int, dict[str, Tensor]]
    """By rank; `random_state` of each."""
    tokenizer_file: Path | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An intact folder. Tensors are read when they are first asked for, whole, on the CPU."""

    folder: Path
    state: TrainState
    config: dict[str, Any]
    tokenizer_file: Path | None
    """The vocabulary it was trained with; None for the one that ships with the code."""

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


def checkpoint_dir(checkpoints: Path, step: int) -> Path:
    return checkpoints / step_dir_name(step)


def flatten_moments(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The optimizer's state by NAME.exp_avg and so on, from that by parameter."""
    return {f"{name}.{kind}": tensor for name, kinds in moments.items() for kind, tensor in kinds.items()}


def unflatten_moments(moments: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The other way round."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in moments.items():
        parameter, _, kind = name.rpartition(".")
        found.setdefault(parameter, {})[kind] = tensor
    return found


# -- writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    checkpoints: Path,
    state: TrainState,
    config: dict[str, Any],
    model: dict[str, Tensor],
    optimizer: dict[str, dict[str, Tensor]],
    random: list[dict[str, Tensor]],
    keep_last: int = 0,
    tokenizer_file: Path | None = None,
) -> Path:
    """Write one checkpoint from one process; see `write`."""
    shares = (strip_wrapper_prefixes(model.items()), flatten_moments(optimizer), dict(enumerate(random)))
    return write_checkpoint(checkpoints, Snapshot(state, config, *shares, tokenizer_file), RetentionPolicy(keep_last))


def write_checkpoint(
    checkpoints: Path, snapshot: Snapshot, keep: RetentionPolicy = KEEP_ALL, group: dist.ProcessGroup | None = None
) -> Path:
    """Write one checkpoint, on all ranks of a group together, then remove those that are not to be kept.

    A copy of `tokenizer_file` goes with it: weights say nothing without the vocabulary that they were trained with.

    Raises:
        UserError: no room on the disk, or ranks that do not see one another's files; older checkpoints are untouched.
    """
    final = checkpoint_dir(checkpoints, snapshot.state.step)
    work = checkpoints / f".partial-{final.name}"
    first = distributed.is_first(group)
    try:
        distributed.run_on_all_ranks(lambda: _make_work_dir(work) if first else None, group)
        write_tensors(work / WEIGHTS, snapshot.weights, group)
        write_tensors(work / OPTIMIZER, snapshot.optimizer, group)
        written = distributed.run_on_all_ranks(
            lambda: _write_rank_files(work, snapshot, distributed.group_rank(group)), group
        )
        distributed.run_on_all_ranks(lambda: _finalize(work, final, written, keep) if first else None, group)
    except (OSError, RuntimeError) as error:
        if not out_of_space(error):
            raise
        raise UserError(
            f"no room to save step {snapshot.state.step:,} in {checkpoints}: the disk is full; older checkpoints are "
            "untouched. Free some space and start the same command again"
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
    """Random state, and on rank 0 what is not a tensor; gives name, size and hash of all files that this rank wrote."""
    for number, state in snapshot.random.items():
        _write(work / RANDOM / f"rank_{number:05d}.pt", state)
    mine = [*work.glob(f"*/__{rank}_*"), *(work / RANDOM / f"rank_{number:05d}.pt" for number in snapshot.random)]
    if rank == 0:
        write_json(work / "state.json", STATE.stamp(asdict(snapshot.state)))
        write_json(work / "config.json", snapshot.config)
        if snapshot.tokenizer_file:
            write_text(work / TOKENIZER, snapshot.tokenizer_file.read_bytes().decode("utf-8"))
        mine += [path for path in work.iterdir() if path.is_file()]
        mine += [work / folder / METADATA for folder in (WEIGHTS, OPTIMIZER)]
    return {
        path.relative_to(work).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in mine
    }


def _finalize(work: Path, final: Path, written: list[dict[str, Any]], keep: RetentionPolicy) -> None:
    """The manifest, then the name. Rank 0, when all ranks' files are on the disk."""
    files = {name: about for one in written for name, about in sorted(one.items())}
    here = {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()}
    if missing := sorted(files.keys() - here):
        raise UserError(
            f"{', '.join(missing[:3])} of {final}, which other ranks have written, cannot be seen from rank 0; the run "
            "folder must be on a file system that all machines share: set MYLLM_DATA to one"
        )
    write_json(work / MANIFEST, {"format": FORMAT, "files": files})
    for folder in (*(path for path in work.iterdir() if path.is_dir()), work):
        fsync_dir(folder)
    move_aside(final)  # a damaged one that was trained past again
    work.rename(final)
    fsync_dir(final.parent)
    remove_replaced(final)
    if keep.alone:
        remove_other_checkpoints(final)
    for old in keep.surplus(final):
        remove_checkpoint(old)


def _write(path: Path, content: Any) -> None:
    # Through Python's file: torch's RuntimeError about a write that failed then has the OSError as its context.
    with add_filename(path), path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


# -- reading ----------------------------------------------------------------------------------------------------------


def load_latest(checkpoints: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, or None where there is none at all; says why newer ones were passed over.

    On many ranks all call this and get the same: rank 0 chooses, and each rank hashes a share of the files.

    Raises:
        UserError: there are checkpoints and every one is damaged; starting over is for the user to decide.
    """
    folders = distributed.broadcast_object(list_checkpoints(checkpoints))
    for folder in iter_intact(folders, log, verify_on_all_ranks):
        return _open(folder)
    if folders:
        raise UserError(
            f"no checkpoint in {checkpoints} is intact; restore one, or start over with --train.fresh (the old run is "
            "moved aside)"
        )
    return None


def load_checkpoint(folder: Path, hashed: tuple[str, ...] = HASH_ALL) -> Checkpoint:
    """One checkpoint, whatever its folder is called. Nothing in it is executed: tensors and plain values only.

    Args:
        hashed: as in `verify`; MODEL is enough where nothing but the model is to be read.

    Raises:
        Damaged: not a checkpoint, or a damaged one.
        UserError: a later version of this program wrote it.
    """
    if faults := list(content_faults(folder, hashed)):
        raise DamagedCheckpoint(f"{folder} is not an intact checkpoint: {'; '.join(faults)}")
    return _open(folder)


def load_first_intact(folders: Iterable[Path], say: Callable[[str], None]) -> Checkpoint | None:
    """The first whose model is intact; None where none is. Says which were passed over, and why."""
    for folder in iter_intact(folders, say, partial(verify_checkpoint, hashed=HASH_MODEL)):
        return _open(folder)
    return None


def _open(folder: Path) -> Checkpoint:
    return Checkpoint(
        folder=folder,
        state=read_state(folder),
        config=read_json(folder / "config.json"),
        tokenizer_file=folder / TOKENIZER if (folder / TOKENIZER).is_file() else None,
    )


# -- random state -----------------------------------------------------------------------------------------------------
