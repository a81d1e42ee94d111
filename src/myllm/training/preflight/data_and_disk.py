"""The text and the disk space of a run, before anything is prepared. Asks no server, writes and hashes nothing."""

from dataclasses import dataclass, replace
from pathlib import Path

from myllm import paths
from myllm.config import DataConfig, RunConfig, from_dict
from myllm.data.dataset import MANIFEST, SETTINGS, Dataset
from myllm.data.find import find_dataset
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.mixture.spec import Mixture, component_configs, find_mixture
from myllm.data.prepare.spec import make_spec
from myllm.data.sources.catalog import CORPORA
from myllm.data.sources.hf_datasets.name import absolute_source
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer, trained_vocab_size
from myllm.files import folder_bytes, free_bytes, nearest_existing, read_json
from myllm.formatting import parse_count
from myllm.planning.disk import disk_estimate_bytes
from myllm.planning.length import describe_length

IN_FLIGHT_BYTES = 8_000_000_000
"""Downloads on the disk at a time if they are not kept: a rough number; the preparation computes its own."""


@dataclass(frozen=True)
class DataAndDisk:
    """The disk that a run writes to, and the text that it trains on."""

    folder: Path
    free_bytes: int
    shards_bytes: int
    """Still to be written."""
    downloads_bytes: int
    run_bytes: int
    """Of this run, on the disk now."""
    tokens: int | None
    """Training tokens once all is prepared. None: unknown."""
    tokens_are_exact: bool
    """Counted, not estimated from file sizes."""
    source: str
    """Name of the text, for messages."""
    mixture: MixedDataset | None = None
    """A prepared mixture: the text is several."""

    def describe_length(self, config: RunConfig) -> list[str]:
        """As `planning.length.describe_length`; `tokens` are known."""
        if self.mixture:
            return self.mixture.describe_length(config)
        return describe_length(config, self.tokens or 0, self.tokens_are_exact)


def tokenizer_for(config: RunConfig) -> Tokenizer:
    """The tokenizer of the run's data set, prepared or not."""
    if config.data.dataset is not None:
        return find_dataset(config.data.dataset, allow_incomplete=True).tokenizer()
    if trained_vocab_size(config.data.tokenizer):
        return make_spec(config.data).tokenizer
    return load_tokenizer(config.data.tokenizer)


def inspect_data_and_disk(config: RunConfig) -> DataAndDisk:
    """
    Raises:
        UserError: the source does not exist.
    """
    if mixture := find_mixture(config.data):
        return _inspect_mixture(config, mixture)
    data, folder = config.data, nearest_existing(paths.runs_dir())
    dataset = find_prepared(data)
    tokens: int | None
    shards, downloads, exact = disk_estimate_bytes(config)["token shards, at most"], 0, False
    if dataset is not None and dataset.known_train_tokens:
        shards, tokens, exact, source = 0, dataset.known_train_tokens, True, dataset.name
    elif corpus := CORPORA.get(data.source.partition(":")[0]):
        tokens, source = parse_count(corpus.tokens) if " " not in corpus.tokens else None, data.source
        downloads = int(corpus.download_gb * 1e9)
        if not data.keep_downloads:
            downloads = min(downloads, IN_FLIGHT_BYTES)
        elif data.target_tokens and tokens:
            downloads = int(downloads * min(data.target_tokens / tokens, 1))
    elif data.source.startswith(("hub:", "datasets:")):
        downloads, tokens, source = IN_FLIGHT_BYTES, None, data.source
    else:
        spec = make_spec(data, hashed=False)
        tokens, source = max(spec.estimated_tokens - spec.estimated_val_tokens, 0), spec.source.description
        shards = min(shards, spec.tokenizer.dtype.itemsize * spec.estimated_tokens)
    return DataAndDisk(
        folder,
        free_bytes=free_bytes(folder),
        shards_bytes=max(shards - folder_bytes(dataset.folder), 0) if dataset is not None else shards,
        downloads_bytes=downloads,
        run_bytes=0 if config.train.fresh else folder_bytes(paths.RunPaths.of(config.name).root),
        tokens=tokens,
        tokens_are_exact=exact,
        source=source,
    )


def _inspect_mixture(config: RunConfig, mixture: Mixture) -> DataAndDisk:
    parts = [inspect_data_and_disk(replace(config, data=part)) for part in component_configs(config.data, mixture)]
    dataset = find_prepared(config.data)
    return replace(
        parts[0],
        shards_bytes=sum(part.shards_bytes for part in parts),
        downloads_bytes=sum(part.downloads_bytes for part in parts),
        tokens=dataset.known_train_tokens if dataset else None,
        tokens_are_exact=True,
        source=mixture.format(),
        mixture=dataset if isinstance(dataset, MixedDataset) else None,
    )


def find_prepared(config: DataConfig) -> Dataset | None:
    """The data set with these settings, complete or not; a mixture only if complete. Compares settings, so that nothing
    is hashed."""
    if mixture := find_mixture(config):
        found = [find_prepared(part) for part in component_configs(config, mixture)]
        components = [component for component in found if component is not None and component.complete]
        return MixedDataset.of(mixture, components) if len(components) == len(found) else None
    if config.dataset is not None:
        return find_dataset(config.dataset, allow_incomplete=True)
    wanted = replace(config, source=absolute_source(config.source))
    # What settings.json lacks is the same for this purpose, or younger than the data set.
    base = RunConfig(data=replace(wanted, suffixes=DataConfig.suffixes))
    for file in sorted(paths.datasets_dir().glob(f"[!.]*/{SETTINGS}")):
        try:
            if from_dict({"data": read_json(file)}, base).data == wanted:
                return Dataset.open(file.parent, allow_incomplete=not (file.parent / MANIFEST).is_file())
        except (OSError, ValueError):  # also a UserError: damaged or just begun; the preparation deals with it
            continue
    return None
