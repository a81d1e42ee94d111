"""Names of the folders and files of checkpoints."""

import re
from pathlib import Path
from typing import Any

from myllm.files import read_json

FORMAT = "myllm-checkpoint-2"
MANIFEST, STATE_FILE, CONFIG_FILE, TOKENIZER = "manifest.json", "state.json", "config.json", "tokenizer.json"
WEIGHTS, OPTIMIZER, RANDOM = "weights", "optimizer", "random"
METADATA = ".metadata"
"""The file of torch.distributed.checkpoint that says which tensor is where in the other files of its folder."""
_STEP = re.compile(r"step_([0-9]+)")


def step_dir_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_dir(checkpoints: Path, step: int) -> Path:
    return checkpoints / step_dir_name(step)


def is_step_name(name: str) -> bool:
    """True for `step_` and digits."""
    return _STEP.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder; 0 for any other name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else 0


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints (those with a final name), newest first."""
    found = [path for path in checkpoints.glob("step_*") if is_step_name(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name == step_dir_name(step_of(path))), reverse=True)


def newest_step(checkpoints: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max(map(step_of, list_checkpoints(checkpoints)), default=0)


def saved_step(folder: Path) -> int | None:
    """The step in a checkpoint's state.json; None if it cannot be read."""
    try:
        step = read_json(folder / STATE_FILE)["step"]
    except (OSError, ValueError, KeyError):
        return None
    return step if type(step) is int else None


def manifest_entries(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The size in bytes and the sha256 of each file, from a checkpoint's manifest.

    Raises:
        KeyError, ValueError, TypeError, AttributeError, OverflowError: it is no manifest.
    """
    return {
        name: {"bytes": int(entry["bytes"]), "sha256": entry["sha256"]} for name, entry in manifest["files"].items()
    }
