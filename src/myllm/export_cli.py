"""`myllm export` and `myllm import`: from our checkpoints to everyone else's files, and back."""

from pathlib import Path
from typing import Literal

import tyro

from . import paths
from .errors import UserError

Positional = tyro.conf.Positional


def export(
    model: Positional[str],
    to: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint as a folder that transformers opens, checked before it has its name.

    Args:
        model: a run's name or folder (its newest checkpoint), or a checkpoint's folder.
        to: the folder; an earlier export there is replaced.
        dtype: of the weights.
        overwrite: move another folder of that name aside.
    """
    if to is None:
        raise UserError("where to? Give --to FOLDER")
    from .exporting import export_folder
    from .run_folder import latest_checkpoint

    made = export_folder(latest_checkpoint(model, paths.runs()), to, dtype, overwrite=overwrite)
    print(made.parity)
    if made.rounding:
        print(f"rounding to {dtype} changes a logit by at most {made.rounding:.1e}")
    print(f"exported {made.architecture} to {made.folder}")
