"""Find the checkpoint that a user names: by a folder, or by the name of a run."""

from functools import partial
from pathlib import Path

from myllm.errors import UserError, warn
from myllm.paths import no_checkpoint_error, user_path, warn_if_ambiguous

from .format import Checkpoint, load_checkpoint, open_checkpoint
from .integrity import HASH_MODEL, iter_intact, name_errors, verify_checkpoint
from .layout import MANIFEST, STATE_FILE, is_step_name, list_checkpoints


def find_checkpoint(name: str, runs: Path) -> Checkpoint:
    """Load the model of the checkpoint that a user means, with hashed files. Warns of newer ones that it skips.

    Args:
        name: the folder of a checkpoint, whatever its name; or the folder or name of a run, for its newest intact one.

    Raises:
        UserError: no checkpoint there, or none that is intact.
    """
    root, folders = resolve_checkpoints(name, runs)
    warn_if_ambiguous(name, root, runs / name)
    if folders == [root]:
        for error in name_errors(root):
            warn(f"{root}: {error}")
        return load_checkpoint(root, HASH_MODEL)
    verify = partial(verify_checkpoint, hashed=HASH_MODEL)
    for folder in iter_intact(folders, warn, verify):
        return open_checkpoint(folder)
    raise UserError(f"no checkpoint in {folders[0].parent} is intact: {'; '.join(verify(folders[0]))}")


def resolve_checkpoints(name: str, runs: Path) -> tuple[Path, list[Path]]:
    """List the checkpoints that a user means: of a run (name or folder), of a folder of checkpoints, or a single one.

    Returns:
        the folder that `name` stands for, and its checkpoints, newest first. Nothing is hashed.

    Raises:
        UserError: no checkpoint there.
    """
    for root in (user_path(name), runs / name):
        # Data sets have a manifest too, but no state.
        if (root / MANIFEST).is_file() and (is_step_name(root.name) or (root / STATE_FILE).is_file()):
            return root, [root]
        if folders := list_checkpoints(root / "checkpoints") or list_checkpoints(root):  # a run, or its best/
            return root, folders
    raise no_checkpoint_error(name, runs)
