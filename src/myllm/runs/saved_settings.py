"""What a run that has been begun goes on with, whatever today's defaults are: its data set, and how long it is."""

import json
from dataclasses import asdict, replace

from myllm import paths
from myllm.checkpoint.layout import list_checkpoints, step_of
from myllm.config import DataConfig, RunConfig, load_config
from myllm.data.dataset import FORMAT, MANIFEST
from myllm.errors import UserError

MADE_AGAIN = ("dataset", "val_tokens", "shard_tokens", "workers", "keep_downloads", "fallback")
"""Settings of the data that say nothing of which text it is. Their defaults have changed, and may again."""


def keep_saved_settings(config: RunConfig, own_text: bool) -> tuple[RunConfig, bool]:
    """The config, with the data set of the run of this name where it has a checkpoint and is to have the same text.

    Args:
        own_text: nobody said how long to train (`plan.with_length`).

    Returns:
        the config, and `own_text`: false where the run's own length, which does not change by resuming, was taken.
    """
    run = paths.RunPaths.of(config.name)
    if config.train.fresh or not any(step_of(folder) for folder in list_checkpoints(run.checkpoints)):
        return config, own_text
    try:
        saved = load_config(run.config, RunConfig())
        about = json.loads(run.environment.read_text(encoding="utf-8"))
        name, fingerprint = str(about["dataset"]), about["dataset_hash"]
    except (UserError, OSError, ValueError, KeyError, TypeError):  # whatever is wrong, resuming will say
        return config, own_text
    if _is_of_earlier_defaults(config.data, saved.data, name, fingerprint):
        config = replace(config, data=replace(config.data, dataset=name))
    if own_text:
        config = replace(config, train=replace(config.train, max_steps=saved.train.max_steps))
    return config, False


def _is_of_earlier_defaults(wanted: DataConfig, saved: DataConfig, name: str, fingerprint: str) -> bool:
    """Whether the run's data set is there, and only a changed default or format keeps it from being found."""
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
    return {key: value for key, value in asdict(data).items() if key not in MADE_AGAIN}
