"""`myllm checkpoint COMMAND`: what a run has saved, and whether it is still what was saved."""

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


def verify(where: Positional[str]) -> None:
    """Check a run's checkpoints against their manifests.

    Exit code 2 where something is damaged.

    Args:
        where: a run's name or folder, or the folder of one checkpoint.
    """
    damaged = []
    for about in _described(_find(where), hashing=True):
        print(f"{about['folder']}: {about['state']}", flush=True)
        damaged += [about["folder"]] if about["state"] != "intact" else []
    if damaged:
        raise UserError(
            f"{len(damaged)} damaged: {', '.join(damaged)}. Training goes on from the newest intact one; restore a "
            "damaged one from a copy, or delete its folder"
        )


def list_all(where: Positional[str], as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """List a run's checkpoints, and whether each has all its files; `checkpoint verify` hashes them.

    Args:
        where: a run's name or folder.
        as_json: print a JSON object a line instead: folder, step, tokens, bytes, validation_loss, where, state.
    """
    from myllm.files import json_safe
    from myllm.formatting import format_bytes

    rows = []
    for about in _described(_find(where), hashing=False):
        if as_json:
            print(json.dumps(json_safe(about)), flush=True)
            continue
        loss = "-" if about["validation_loss"] is None else f"{about['validation_loss']:.4f}"
        tokens = "-" if about["tokens"] is None else f"{about['tokens']:,}"
        rows.append((f"{about['step']:,}", tokens, format_bytes(about["bytes"]), loss, about["where"], about["state"]))
    if not as_json:
        widths = [max(len(row[column]) for row in (TITLES, *rows)) for column in range(len(TITLES) - 1)]
        for row in (TITLES, *rows):
            right = [cell.rjust(width) for cell, width in zip(row[:4], widths, strict=False)]
            print("  ".join((*right, row[4].ljust(widths[4]), row[5])).rstrip())
        print(f"(by the sizes of the files; `myllm checkpoint verify {where}` hashes them)", file=sys.stderr)


def _find(where: str) -> list[Path]:
    """The checkpoints that a user means, oldest first, those in best/ last."""
    from myllm import paths
    from myllm.checkpoint.layout import MANIFEST, STATE_FILE, is_step_name, list_checkpoints

    for root in (user_path(where), paths.runs_dir() / where):
        if root.is_dir() and (
            is_step_name(root.name) or ((root / MANIFEST).is_file() and (root / STATE_FILE).is_file())
        ):
            return [root]
        if found := list_checkpoints(root / "checkpoints")[::-1] + list_checkpoints(root / "best"):
            return found
        if found := list_checkpoints(root):
            return found[::-1]
    raise paths.no_checkpoint_error(where, paths.runs_dir())


def _described(folders: list[Path], hashing: bool) -> Iterator[dict[str, Any]]:
    """One after another, since hashing takes seconds a gigabyte; a bar on a terminal says how far it is."""
    from tqdm import tqdm

    from myllm.checkpoint.integrity import HASH_ALL, HASH_NONE, verify_checkpoint
    from myllm.checkpoint.layout import step_of
    from myllm.checkpoint.state import read_state
    from myllm.paths import RunPaths

    losses = _validation_losses(RunPaths(folders[0].parent.parent))
    hidden = None if hashing else True  # None: shown on a terminal only
    for folder in tqdm(folders, desc="hashing", unit="checkpoint", disable=hidden, leave=False, file=sys.stderr):
        faults = list(verify_checkpoint(folder, HASH_ALL if hashing else HASH_NONE))
        if not folder.is_dir():  # training has removed it meanwhile
            continue
        tokens = None
        if not faults:
            tokens = read_state(folder).tokens_seen
        yield {
            "folder": str(folder),
            "step": step_of(folder),
            "tokens": tokens,
            "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "validation_loss": losses.get(step_of(folder)),
            "where": folder.parent.name,
            "state": "; ".join(faults) or "intact",
        }


def _validation_losses(run: Any) -> dict[int, float]:
    """By step, of what a run has measured so far; empty where there is no run."""
    from myllm.runs.logs import JsonlFile

    rows = JsonlFile(run.metrics).rows() if run.metrics.is_file() else ()
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "eval" and row.get("name") == "validation"}
