"""Flight bags: one step whose numbers went bad, with everything it takes to make it again elsewhere.

`bags/step_00000123/` holds the step that would have been update 123:

    bag.json       what happened: the numbers, the data position, who was bad first
    samples.jsonl  the step's samples in their order: sequence, rank, micro-step, loss, text
    tokens.npy     the same samples as tokens, (samples, seq_len + 1) uint16
    layers.json    norms of weights, gradients and activations by layer, for each rank
    config.json    the run's config
    model.pt       weights before the step
    optimizer.pt   AdamW's moments before the step
    random.pt      random state of every rank before the step

A bag is written under a temporary name, flushed to the disk and renamed: it is whole, or it is not there.
docs/checkpoint_format.md describes the files.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from myllm.checkpoint.retention import folder_name, holds_only, list_checkpoints, unused
from myllm.errors import UserError
from myllm.files import fsync_folder, parse_json, read_json, write_json, write_text
from myllm.migrations import BAG, CONFIG
from myllm.nonfinite import json_safe
from myllm.paths import user_path

FORMAT = "myllm-bag-1"
ABOUT = "bag.json"
FILES = {ABOUT, "samples.jsonl", "tokens.npy", "layers.json", "config.json", "model.pt", "optimizer.pt", "random.pt"}


@dataclass(frozen=True)
class AnomalyDump:
    """What a folder holds, in memory, on the CPU."""

    folder: Path
    about: dict[str, Any]
    samples: list[dict[str, Any]]
    tokens: np.ndarray
    """(samples, seq_len + 1) uint16"""
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: list[dict[str, Tensor]]


def bag_folder(bags: Path, step: int) -> Path:
    return bags / folder_name(step)


def write_dump(folder: Path, content: AnomalyDump, layers: list[Any]) -> None:
    """Write a bag, in one step as far as readers can tell. One of the same step that is there already
    is replaced; anything else that has its name gets another one.

    Raises:
        OSError, RuntimeError: it could not be written, and is not there.
    """
    work = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        for name in ("model", "optimizer", "random"):
            with (work / f"{name}.pt").open("wb") as file:
                torch.save(getattr(content, name), file)
                _flush(file)
        with (work / "tokens.npy").open("wb") as file:
            np.save(file, content.tokens)
            _flush(file)
        lines = (json.dumps(json_safe(row), ensure_ascii=False) + "\n" for row in content.samples)
        write_text(work / "samples.jsonl", "".join(lines))
        write_json(work / "layers.json", json_safe(layers))
        write_json(work / "config.json", content.config)
        write_json(work / ABOUT, json_safe(BAG.stamp({"format": FORMAT, **content.about})))
        fsync_folder(work)
        if folder.is_dir() and holds_only(folder, FILES):
            shutil.rmtree(folder)
        elif folder.exists():
            folder.rename(unused(folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")))
        work.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_dump(folder: Path) -> AnomalyDump:
    """A bag's content. Nothing in it is executed: tensors and plain values only.

    Raises:
        UserError: not a bag, or one that cannot be read.
    """
    try:
        about = BAG.upgrade(read_json(folder / ABOUT), folder / ABOUT)
        if about.get("format") != FORMAT:
            raise UserError(f"{folder} has format {about.get('format')!r}, expected {FORMAT!r}")
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
        tensors = {
            name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
            for name in ("model", "optimizer", "random")
        }
        return AnomalyDump(
            folder=folder,
            about=about,
            samples=[parse_json(line, folder / "samples.jsonl") for line in lines if line],
            tokens=np.load(folder / "tokens.npy"),
            config=CONFIG.upgrade(read_json(folder / "config.json"), folder / "config.json"),
            **tensors,
        )
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"the flight bag {folder} cannot be read: {error}") from None


def find_dump(where: str, runs: Path) -> Path:
    """The bag that a user means: its folder, or a run's newest by the run's name or folder.

    Raises:
        UserError: nothing there.
    """
    for root in (user_path(where), runs / where):
        if (root / ABOUT).is_file():
            return root
        if found := _bags_in(root):
            return found[0]
    known = sorted(root.name for root in runs.glob("*") if _bags_in(root))
    raise UserError(f"no flight bag at {where!r}; runs that have one: {', '.join(known) or 'none'}")


def _bags_in(run: Path) -> list[Path]:
    return [folder for folder in list_checkpoints(run / "bags") if (folder / ABOUT).is_file()]


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
