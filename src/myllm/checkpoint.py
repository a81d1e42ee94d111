"""Checkpoints: whole, checked, and never under their final name before they are both.

`checkpoints/step_00000100/` holds the state after 100 updates:

    model.pt        weights by name, float32, without any wrapper's prefix
    optimizer.pt    AdamW's moments by the same names
    random.pt       random state of every rank, for dropout
    state.json      TrainState: step, tokens, data position, early stopping
    config.json     the run's config
    tokenizer.json  the vocabulary, where it is not the one that ships with the code
    manifest.json   sha256 and size of each of these; written last

A save goes to a temporary folder, is flushed to the disk, and is renamed. A load takes the newest checkpoint whose
files are what its manifest says and falls back to older ones. docs/checkpoint_format.md describes the files.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .data.order import DataPosition
from .data.receipt import Receipt
from .early_stop import EarlyStop
from .errors import UserError
from .files import file_sha256, fsync_folder, out_of_space, write_json, write_text

FORMAT = "myllm-checkpoint-1"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
UNBOUND = ""
"""In place of a data set's hash: weights from elsewhere, to be trained on whatever they are given."""
FILES = {"model.pt", "optimizer.pt", "random.pt", "state.json", "config.json"}


@dataclass(frozen=True)
class TrainState:
    """How far a run has come. With weights, optimizer and random state, all that survives a restart."""

    step: int
    """Completed optimizer updates."""
    tokens_seen: int
    data: DataPosition
    early_stop: EarlyStop | None = None
    """None: early stopping is off."""
    receipt: Receipt | None = None
    """Of every sample trained on. None: nothing yet, or a checkpoint from before there were receipts."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, in memory, on the CPU."""

    folder: Path
    state: TrainState
    config: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    random: list[dict[str, torch.Tensor]]
    tokenizer_file: Path | None
    """The vocabulary it was trained with; None for the one that ships with the code."""


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders that carry a final name, newest first."""
    return sorted((path for path in checkpoints.glob("step_*") if path.is_dir()), reverse=True)


def save(
    checkpoints: Path,
    state: TrainState,
    config: dict[str, Any],
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    random: list[dict[str, torch.Tensor]],
    keep_last: int,
    tokenizer_file: Path | None = None,
) -> Path:
    """Write one checkpoint, then remove those beyond the newest `keep_last` (0: keep all).

    A copy of `tokenizer_file` goes with it: weights say nothing without the vocabulary that they were trained with.

    Raises:
        UserError: no room on the disk; older checkpoints are untouched.
    """
    final = checkpoint_folder(checkpoints, state.step)
    work = checkpoints / f".partial-{final.name}"
    checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        for name, content in (("model.pt", model), ("optimizer.pt", optimizer), ("random.pt", random)):
            _write(work / name, content)
        write_json(work / "state.json", asdict(state))
        write_json(work / "config.json", config)
        if tokenizer_file:
            write_text(work / TOKENIZER, tokenizer_file.read_bytes().decode("utf-8"))
        write_json(work / MANIFEST, _manifest(work))
        fsync_folder(work)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that was trained past again
        work.rename(final)
        fsync_folder(checkpoints)
    except (OSError, RuntimeError) as error:
        if not out_of_space(error):
            raise
        raise UserError(
            f"no room to save step {state.step:,} in {checkpoints}: the disk is full; older checkpoints are untouched. "
            "Free some space and start the same command again"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if keep_last:
        # Newer ones are damaged, or training would have gone on from them: they must not crowd out sound ones.
        older = [folder for folder in list_checkpoints(checkpoints) if folder.name <= final.name]
        for old in older[keep_last:]:
            shutil.rmtree(old)
    return final


def remove_others(folder: Path) -> None:
    """Leave one checkpoint alone in its folder."""
    for other in list_checkpoints(folder.parent):
        if other != folder:
            shutil.rmtree(other)


def load_latest(checkpoints: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, or None where there is none at all; says why newer ones were passed over.

    Raises:
        UserError: there are checkpoints and every one is damaged; starting over is for the user to decide.
    """
    folders = list_checkpoints(checkpoints)
    for folder in folders:
        faults = list(verify(folder))
        if not faults:
            return load(folder)
        log(f"passing over {folder}: {'; '.join(faults)}")
    if folders:
        raise UserError(
            f"no checkpoint in {checkpoints} is intact; restore one, or start over with --train.fresh (the old run is "
            "moved aside)"
        )
    return None


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what killed saves left behind."""
    for folder in checkpoints.glob(".partial-*"):
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """One checkpoint. Nothing in it is executed: tensors and plain values only.

    Raises:
        UserError: not a checkpoint, or a damaged one.
    """
    faults = list(verify(folder))
    if faults:
        raise UserError(f"{folder} is not an intact checkpoint: {'; '.join(faults)}")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    position, early = DataPosition(**state.pop("data")), state.pop("early_stop", None)
    receipt = state.pop("receipt", None)
    return Checkpoint(
        folder=folder,
        state=TrainState(
            **state,
            data=position,
            early_stop=EarlyStop(**early) if early else None,
            receipt=Receipt(**receipt) if receipt else None,
        ),
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        model=torch.load(folder / "model.pt", map_location="cpu", weights_only=True),
        optimizer=torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
        random=torch.load(folder / "random.pt", map_location="cpu", weights_only=True),
        tokenizer_file=folder / TOKENIZER if (folder / TOKENIZER).is_file() else None,
    )


def verify(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint's files, by content; nothing if it is intact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except FileNotFoundError:
        yield f"it has no {MANIFEST}"
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"its {MANIFEST} cannot be read ({error})"
        return
    if manifest.get("format") != FORMAT:
        yield f"its format is {manifest.get('format')!r}, expected {FORMAT!r}"
        return
    if missing := FILES - {name for name, _ in files}:
        yield f"its {MANIFEST} does not name {', '.join(sorted(missing))}"
        return
    for name, expected in files:
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{name} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
        elif file_sha256(path) != expected["sha256"]:
            yield f"the content of {name} has changed"


def _manifest(folder: Path) -> dict[str, Any]:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    return {"format": FORMAT, "files": files}


def _write(path: Path, content: Any) -> None:
    # Through Python's file: torch's RuntimeError about a write that failed then has the OSError as its context.
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


# -- random state -----------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """This rank's generators: the CPU's, and the device's where it has its own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
