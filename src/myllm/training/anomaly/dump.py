"""Anomaly dumps: a training step that diverged, with everything needed to replay it on another machine.

`anomalies/step_00000123/` holds the step that would have been update 123:

    step_00000122/  an ordinary checkpoint of the state before the step (checkpoint/format.py)
    tokens.npy      the step's samples as tokens, (samples, seq_len + 1), of the data set's dtype
    samples.jsonl   the same samples: sequence, rank, micro-step, loss, text
    layers.json     norms of weights, gradients and activations by layer, for each rank
    anomaly.json    summary: loss, gradient norm, data position, first module that was not finite

A dump is written under a temporary name, flushed to the disk and renamed, so it is never incomplete.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints, step_dir_name
from myllm.checkpoint.retention import dated_path, is_removable
from myllm.config import RunConfig, saved_config
from myllm.errors import UserError
from myllm.files import fsync_dir, json_safe, parse_json, read_json, write_json, write_text
from myllm.migrations import ANOMALY
from myllm.paths import RunPaths, user_path

from .diagnose import Diagnosis

SUMMARY, OLD_SUMMARY = "anomaly.json", "bag.json"
TOKENS, SAMPLES, LAYERS = "tokens.npy", "samples.jsonl", "layers.json"


@dataclass(frozen=True)
class AnomalyDump:
    """A dump in memory, on the CPU."""

    folder: Path
    summary: dict[str, Any]
    samples: list[dict[str, Any]]
    tokens: np.ndarray
    """(samples, seq_len + 1), of the data set's dtype"""
    config: RunConfig
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: list[dict[str, Tensor]]
    """By rank: random state before the step."""


def dump_folder(run: RunPaths, step: int) -> Path:
    return run.anomalies / step_dir_name(step)


def partial_folder(folder: Path) -> Path:
    """Where the files of a dump are gathered. The next start of the run removes it if a crash leaves it behind."""
    return folder.with_name(f".partial-{folder.name}")


def finish_dump(
    folder: Path,
    summary: dict[str, Any],
    samples: list[dict[str, Any]],
    tokens: np.ndarray,
    diagnoses: list[Diagnosis | None],
) -> None:
    """Add what is not the checkpoint's to `partial_folder`, then rename it. Called on rank 0.

    An earlier dump of the same step is replaced, unless it holds other files: then it is moved aside.
    """
    work = partial_folder(folder)
    with (work / TOKENS).open("wb") as file:
        np.save(file, tokens)
        file.flush()
        os.fsync(file.fileno())
    write_text(work / SAMPLES, "".join(json.dumps(json_safe(row), ensure_ascii=False) + "\n" for row in samples))
    layers = [[asdict(layer) for layer in diagnosis.layers] if diagnosis else None for diagnosis in diagnoses]
    write_json(work / LAYERS, json_safe(layers))
    write_json(work / SUMMARY, json_safe(ANOMALY.stamp(summary)))
    fsync_dir(work)
    if folder.is_dir() and _is_unchanged(folder):
        shutil.rmtree(folder)
    elif folder.exists():
        folder.rename(dated_path(folder))
    work.rename(folder)
    fsync_dir(folder.parent)


def _is_unchanged(folder: Path) -> bool:
    """True if a dump holds nothing but what `finish_dump` and the checkpoint's save wrote."""
    ours = {SUMMARY, TOKENS, SAMPLES, LAYERS}
    return all(is_removable(path) if path.is_dir() else path.name in ours for path in folder.iterdir())


def read_dump(folder: Path) -> AnomalyDump:
    """Read a dump. Nothing in it is executed: it holds tensors and plain values only.

    Raises:
        UserError: not a dump, or a damaged one.
    """
    try:
        old = (folder / OLD_SUMMARY).is_file()
        file = folder / (OLD_SUMMARY if old else SUMMARY)
        lines = (folder / SAMPLES).read_text(encoding="utf-8").split("\n")
        return AnomalyDump(
            folder=folder,
            summary=ANOMALY.upgrade(read_json(file), file),
            samples=[parse_json(line, folder / SAMPLES) for line in lines if line],
            tokens=np.load(folder / TOKENS),
            **(_old_state(folder) if old else _state(folder)),
        )
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"cannot read the anomaly dump {folder}: {error}") from None


def _state(folder: Path) -> dict[str, Any]:
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise UserError(f"the anomaly dump {folder} has no checkpoint in it; expected a folder step_...")
    saved = load_checkpoint(checkpoints[0])
    config = saved_config(saved.config, saved.folder / "config.json")
    return {"config": config, "model": saved.model, "optimizer": saved.optimizer, "random": saved.random}


def _old_state(folder: Path) -> dict[str, Any]:
    """The state in a dump of the first layout, whose tensors lay beside its bag.json."""
    names = ("model", "optimizer", "random")
    tensors = {name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True) for name in names}
    return {"config": saved_config(read_json(folder / "config.json"), folder / "config.json"), **tensors}


def find_dump(name: str, runs: Path) -> Path:
    """A dump by its folder, or the newest dump of a run by the run's name or folder.

    Raises:
        UserError: there is none.
    """
    for root in (user_path(name), runs / name):
        if _is_dump(root):
            return root
        if dumps := _dumps_in(root):
            return dumps[0]
    known = sorted(root.name for root in runs.glob("*") if _dumps_in(root))
    raise UserError(f"no anomaly dump at {name!r}; runs with dumps: {', '.join(known) or 'none'}")


def _dumps_in(run: Path) -> list[Path]:
    """Newest first; `bags/` is where the first layout had them."""
    return [dump for parent in ("anomalies", "bags") for dump in list_checkpoints(run / parent) if _is_dump(dump)]


def _is_dump(folder: Path) -> bool:
    return (folder / SUMMARY).is_file() or (folder / OLD_SUMMARY).is_file()
