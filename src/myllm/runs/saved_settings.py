"""Settings that a resumed run keeps even if defaults have changed: its data set, its length and its decay."""

import json
from collections.abc import Collection
from dataclasses import asdict, replace

from myllm import paths
from myllm.checkpoint.layout import list_checkpoints, step_of
from myllm.config import DataConfig, OptimConfig, RunConfig, load_config
from myllm.data.dataset import FORMAT, MANIFEST
from myllm.errors import UserError

NOT_TEXT = ("dataset", "val_tokens", "shard_tokens", "workers", "keep_downloads", "fallback")
"""Data settings that do not select or change the text. Their defaults may differ between versions."""


def keep_saved_settings(config: RunConfig, own_text: bool, given: Collection[str] = ()) -> tuple[RunConfig, bool]:
    """If the run has a checkpoint, take the data set, the length and the length of the decay from it.

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
    if _is_of_earlier_defaults(config.data, saved.data, name, fingerprint):
        config = replace(config, data=replace(config.data, dataset=name))
    is_default = config.optim.decay_fraction == OptimConfig.decay_fraction and "--optim.decay-fraction" not in given
    if is_default:  # it was 0.2 in earlier versions
        config = replace(config, optim=replace(config.optim, decay_fraction=saved.optim.decay_fraction))
    if own_text:
        config = replace(config, train=replace(config.train, max_steps=saved.train.max_steps))
    return config, False


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
