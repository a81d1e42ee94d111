"""The commands `myllm checkpoint list` and `myllm checkpoint verify`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from myllm.errors import UserError
from myllm.paths import user_path

Positional = tyro.conf.Positional
TITLES = ("step", "tokens", "size", "validation loss", "where", "state")


def verify(name: Positional[str]) -> None:
    """Check a run's checkpoints against their manifests.

    Exit code 2 if any is damaged.

    Args:
        name: name or folder of a run, or the folder of one checkpoint.
    """
    damaged = []
    for entry in _describe(_find(name), hashing=True):
        print(f"{entry['folder']}: {entry['state']}", flush=True)
        damaged += [entry["folder"]] if entry["state"] != "intact" else []
    if damaged:
        raise UserError(
            f"{len(damaged)} damaged: {', '.join(damaged)}. Training resumes from the newest intact one; restore a "
            "damaged one from a backup, or delete its folder"
        )


def list_all(name: Positional[str], as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """List a run's checkpoints and check the sizes of their files; `checkpoint verify` checks their content.

    Args:
        name: name or folder of a run.
        as_json: print one JSON object per line: folder, step, tokens, bytes, validation_loss, where, state.
    """
    from myllm.files import json_safe
    from myllm.formatting import format_bytes, format_table

    rows = []
    for entry in _describe(_find(name), hashing=False):
        if as_json:
            print(json.dumps(json_safe(entry)), flush=True)
            continue
        loss = "-" if entry["validation_loss"] is None else f"{entry['validation_loss']:.4f}"
        tokens = "-" if entry["tokens"] is None else f"{entry['tokens']:,}"
        rows.append((f"{entry['step']:,}", tokens, format_bytes(entry["bytes"]), loss, entry["where"], entry["state"]))
    if not as_json:
        print(format_table([TITLES, *rows], right=range(4)))
        print(f"(state by file sizes only; `myllm checkpoint verify {name}` checks the content)", file=sys.stderr)


def _find(name: str) -> list[Path]:
    """The checkpoints that a user means, oldest first, then those in best/; damaged ones too. Imports no torch."""
    from myllm import paths
    from myllm.checkpoint.layout import MANIFEST, STATE_FILE, is_step_name, list_checkpoints

    for root in (user_path(name), paths.runs_dir() / name):
        if root.is_dir() and (
            is_step_name(root.name) or ((root / MANIFEST).is_file() and (root / STATE_FILE).is_file())
        ):
            return [root]
        if found := list_checkpoints(root / "checkpoints")[::-1] + list_checkpoints(root / "best"):
            return found
        if found := list_checkpoints(root):
            return found[::-1]
    raise paths.no_checkpoint_error(name, paths.runs_dir())


def _describe(folders: list[Path], hashing: bool) -> Iterator[dict[str, Any]]:
    """Yields entries one by one, with a progress bar on a terminal: hashing takes seconds per gigabyte."""
    from tqdm import tqdm

    from myllm.checkpoint.integrity import HASH_ALL, HASH_NONE, verify_checkpoint
    from myllm.checkpoint.layout import step_of
    from myllm.checkpoint.state import read_state
    from myllm.files import folder_bytes
    from myllm.paths import RunPaths

    losses = _validation_losses(RunPaths(folders[0].parent.parent))
    hidden = None if hashing else True  # None: shown on a terminal only
    for folder in tqdm(folders, desc="hashing", unit="checkpoint", disable=hidden, leave=False, file=sys.stderr):
        errors = list(verify_checkpoint(folder, HASH_ALL if hashing else HASH_NONE))
        if not folder.is_dir():  # deleted by a running training
            continue
        yield {
            "folder": str(folder),
            "step": step_of(folder),
            "tokens": None if errors else read_state(folder).tokens_seen,
            "bytes": folder_bytes(folder),
            "validation_loss": losses.get(step_of(folder)),
            "where": folder.parent.name,
            "state": "; ".join(errors) or "intact",
        }


def _validation_losses(run: Any) -> dict[int, float]:
    """By step; empty if there is no run."""
    from myllm.runs.logs import JsonlFile

    rows = JsonlFile(run.metrics).rows() if run.metrics.is_file() else ()
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "eval" and row.get("name") == "validation"}
