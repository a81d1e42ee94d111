"""Settings of a resumed run: those that may not change, and those that it keeps even if defaults have changed."""

import json
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from myllm import paths
from myllm.checkpoint.integrity import verify_checkpoint
from myllm.checkpoint.layout import CONFIG_FILE, list_checkpoints, step_of
from myllm.config import DataConfig, OptimConfig, RunConfig, load_config, saved_config
from myllm.data.dataset import FORMAT, MANIFEST
from myllm.errors import UserError, bullets
from myllm.files import read_json
from myllm.presets import diff_settings

NOT_TEXT = ("dataset", "val_tokens", "shard_tokens", "workers", "keep_downloads", "fallback")
"""Data settings that do not select or change the text. Their defaults may differ between versions."""


UNREPORTED = ("data.workers", "data.dataset", "train.fresh")
"""Changes of these settings, and those of the Hub and the mirror, are not reported on resume."""


def check_resumable(saved: dict[str, Any], config: RunConfig, folder: Path) -> list[str]:
    """Compare a config with that of the checkpoint in `folder`.

    Training length, learning rate and hardware may change. The origin and the meaning of the weights, the optimizer's
    state and the data order may not.

    Returns:
        the settings that differ, as "optim.max_lr: 0.001 -> 0.002".

    Raises:
        UserError: a setting differs that may not.
    """
    differences = diff_settings(saved_config(saved, folder / "config.json"), config)
    changed = [
        f"{name}: {old} -> {new}"
        for name, (old, new) in sorted(differences.items())
        if name not in UNREPORTED and not name.startswith(("hub.", "checkpoint."))
    ]
    # The data set is compared by its hash, elsewhere.
    fixed = ("model.", "init.", "optim.optimizer", "train.seed", "train.batch_tokens")
    refused = [line for line in changed if line.startswith(fixed) and not line.startswith("model.dropout")]
    if refused:
        raise UserError(
            f"the checkpoint {folder} was made with other settings:\n{bullets(refused)}\n"
            f"give the same ones to resume (--config {folder / 'config.json'}), another --name to start a second "
            "run, or --train.fresh to start over (the old run is moved aside)"
        )
    return changed


def check_saved_settings(config: RunConfig) -> None:
    """Compare a command with the run of its name, if there is one, before the command writes anything.

    Raises:
        UserError: as `check_resumable`, for the newest checkpoint without errors. Only the config is hashed here.
    """
    run = paths.RunPaths.of(config.name)
    for folder in [] if config.train.fresh else list_checkpoints(run.checkpoints):
        if not any(verify_checkpoint(folder, hashed=(CONFIG_FILE,))):
            check_resumable(read_json(folder / CONFIG_FILE), config, folder)
            return


def keep_saved_settings(config: RunConfig, own_text: bool, given: Collection[str] = ()) -> tuple[RunConfig, bool]:
    """If the run has a checkpoint, take the data set, the length, the length of the decay and the prompts from it.

    Args:
        own_text: the command gave no length, so it follows from the user's own text (`planning.length`).
        given: options of the command.

    Returns:
        the config, and `own_text`: now false if the length is that of the run.
    """
    run = paths.RunPaths.of(config.name)
    if config.train.fresh or not any(step_of(folder) for folder in list_checkpoints(run.checkpoints)):
        return config, own_text
    try:
        saved = load_config(run.config, RunConfig())
        environment = json.loads(run.environment.read_text(encoding="utf-8"))
        name, fingerprint = str(environment["dataset"]), environment["dataset_hash"]
    except (UserError, OSError, ValueError, KeyError, TypeError):  # resuming reports what is wrong
        return config, own_text
    if _is_prefix(config.data.dataset, name) or _is_of_earlier_defaults(config.data, saved.data, name, fingerprint):
        config = replace(config, data=replace(config.data, dataset=name))
    is_default = config.optim.decay_fraction == OptimConfig.decay_fraction and "--optim.decay-fraction" not in given
    if is_default:  # it was 0.2 in earlier versions
        config = replace(config, optim=replace(config.optim, decay_fraction=saved.optim.decay_fraction))
    if not config.eval.sample_prompts:
        config = replace(config, eval=replace(config.eval, sample_prompts=saved.eval.sample_prompts))
    if own_text:
        config = replace(config, train=replace(config.train, max_steps=saved.train.max_steps))
    return config, False


def _is_prefix(given: str | None, name: str) -> bool:
    """True if a command names its data set by a prefix of `name`, which may have become that of others too."""
    if not given or not name.startswith(given) or not (paths.datasets_dir() / name).is_dir():
        return False
    return not any(folder.is_dir() for folder in (paths.user_path(given), paths.datasets_dir() / given))


def _is_of_earlier_defaults(wanted: DataConfig, saved: DataConfig, name: str, fingerprint: str) -> bool:
    """True if the run's data set exists, and is only not found because a default or the format has changed."""
    if wanted.dataset is not None or _text_of(saved) != _text_of(wanted):
        return False
    try:
        manifest = json.loads((paths.datasets_dir() / name / MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"] != fingerprint:
            return False
        return manifest["format"] != FORMAT or (saved.val_tokens, saved.shard_tokens) != (
            wanted.val_tokens,
            wanted.shard_tokens,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _text_of(data: DataConfig) -> dict[str, object]:
    return {key: value for key, value in asdict(data).items() if key not in NOT_TEXT}
