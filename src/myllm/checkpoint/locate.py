"""Find the checkpoint that a user names: by a folder, or by the name of a run."""

from collections.abc import Callable
from pathlib import Path

from myllm.errors import UserError, warn
from myllm.paths import no_checkpoint_error, user_path, warn_if_ambiguous

from .format import Checkpoint, load_checkpoint, load_first_intact
from .integrity import HASH_MODEL, name_faults, verify_checkpoint
from .retention import MANIFEST, is_step_name, list_checkpoints


def find_checkpoint_dir(where: str, runs: Path) -> Path:
    """The folder of `find_checkpoint`."""
    return find_checkpoint(where, runs).folder


def find_checkpoint(where: str, runs: Path, say: Callable[[str], None] = warn) -> Checkpoint:
    """The checkpoint that a user means, for its model: a folder that holds one, whatever its name, or the newest intact
    one of a run, by the run's folder or name. Its model's files have been hashed.

    Args:
        say: told which newer ones were passed over, and why.

    Raises:
        UserError: nothing there, or nothing that is intact.
    """
    root, found = resolve_checkpoints(where, runs)
    warn_if_ambiguous(where, root, runs / where)
    if found == [root]:
        for fault in name_faults(root):
            say(f"{root}: {fault}")
        return load_checkpoint(root, HASH_MODEL)
    if saved := load_first_intact(found, say):
        return saved
    raise UserError(
        f"no checkpoint in {found[0].parent} is intact: {'; '.join(verify_checkpoint(found[0], HASH_MODEL))}"
    )


def resolve_checkpoints(where: str, runs: Path) -> tuple[Path, list[Path]]:
    """What a user means by a run's name or folder, or by a folder of checkpoints or of one, and the checkpoints there,
    newest first. Nothing is hashed.

    Raises:
        UserError: nothing there.
    """
    for root in (user_path(where), runs / where):
        # Data sets have a manifest too, but no state.
        if (root / MANIFEST).is_file() and (is_step_name(root.name) or (root / "state.json").is_file()):
            return root, [root]
        if found := list_checkpoints(root / "checkpoints") or list_checkpoints(root):  # a run, or its best/
            return root, found
    raise no_checkpoint_error(where, runs)
