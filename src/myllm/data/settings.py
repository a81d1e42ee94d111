"""The settings that a data set was prepared with."""

from dataclasses import replace
from pathlib import Path

from myllm import paths
from myllm.config import DataConfig, RunConfig, from_dict
from myllm.data.sources.catalog import actual_source
from myllm.data.tokenizer.gpt2 import NAME
from myllm.data.tokenizer.load import trained_vocab_size
from myllm.errors import UserError
from myllm.files import read_json

from .dataset import SETTINGS, TOKENIZER, Dataset
from .mixture.mixed_dataset import MixedDataset


def read_settings(folder: Path, workers: int = 0) -> DataConfig:
    """The settings that a data set was prepared with.

    Raises:
        UserError: they are missing.
    """
    try:
        values = read_json(folder / SETTINGS)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / SETTINGS}: {error}; prepare the source again") from None
    return from_dict({"data": {**values, "workers": workers}}, RunConfig()).data


def settings_of(dataset: Dataset, config: DataConfig) -> DataConfig:
    """The settings that a data set was prepared with, which may differ from those of a preset.

    Args:
        config: the settings it was opened with. Those that do not change the bytes are kept.
    """
    if isinstance(dataset, MixedDataset):
        return replace(config, dataset=dataset_option(dataset), tokenizer=vocabulary(dataset, config))
    recorded = dataset.manifest["source"]
    if config.dataset is None:  # found by these settings, or by their fallback
        same = actual_source(config.source, None, recorded) == config.source
        return config if same else replace(config, source=config.fallback or recorded)
    try:
        prepared_with = read_settings(dataset.folder)
    except UserError:  # missing; the manifest has everything except the path of the text
        names = ("source", "text_column", "val_tokens", "target_tokens", "max_documents", "shard_tokens")
        values = {name: dataset.manifest[name] for name in names if name in dataset.manifest}
        prepared_with = from_dict({"data": values | dataset.manifest.get("cleaning", {})}, RunConfig()).data
    return replace(
        prepared_with,
        source=actual_source(prepared_with.source, None, recorded),
        dataset=dataset_option(dataset),
        tokenizer=vocabulary(dataset, config),
        workers=config.workers,
        keep_downloads=config.keep_downloads,
        fallback=config.fallback,
    )


def dataset_option(dataset: Dataset) -> str:
    """`data.dataset` for this data set or mixture."""
    is_mixture = isinstance(dataset, MixedDataset)
    return dataset.name if is_mixture else paths.relative_to_data(dataset.folder, paths.datasets_dir())


def vocabulary(dataset: Dataset, config: DataConfig) -> str:
    """`data.tokenizer` for more of the same: the config's, or the data set's if the config names none that could be
    loaded without it."""
    if config.tokenizer != NAME and not trained_vocab_size(config.tokenizer):
        return config.tokenizer
    is_gpt2 = dataset.manifest["tokenizer"]["kind"] == "tiktoken"
    return NAME if is_gpt2 else paths.relative_to_data(dataset.folder / TOKENIZER)
