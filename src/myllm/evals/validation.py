"""Validation on held-out text: which data set has it, and batches of its first sequences."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from myllm import paths
from myllm.data.dataloader import read_batch
from myllm.data.dataset import Dataset
from myllm.data.find import find_dataset
from myllm.data.mixture.spec import parse_mixture
from myllm.data.order import StreamOrder
from myllm.data.token_stream import TokenStream
from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError
from myllm.paths import user_path

if TYPE_CHECKING:
    from myllm.inference.load import ModelSource


def validation_batches(
    stream: TokenStream, n_sequences: int, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One rank's share of the stream's first `n_sequences` sequences, as inputs and targets: always the same tokens.

    Shapes:
        yields (B, seq_len) each, B at most `batch_size`
    """
    sequences = np.arange(n_sequences)[rank::world_size]
    for start in range(0, len(sequences), batch_size):
        yield read_batch(StreamOrder(stream, seq_len), sequences[start : start + batch_size])


def held_out_dataset(source: "ModelSource", tokenizer: Tokenizer, name: str | None) -> Dataset:
    """The data set of this name or, without one, the data set that the model was trained on.

    Raises:
        UserError: not found, damaged, or tokenized with another vocabulary.
    """
    dataset = _training_dataset(source) if name is None else find_dataset(name)
    vocabulary = dataset.manifest["tokenizer"]
    if vocabulary["sha256"] != tokenizer.sha256:
        raise UserError(
            f"the data set {dataset.name} was tokenized with {vocabulary['name']}, but the model uses "
            f"{tokenizer.name}; choose another data set with --dataset"
        )
    return dataset


def _training_dataset(source: "ModelSource") -> Dataset:
    if source.dataset_hash is None:
        raise UserError(
            f"{source.folder} does not record its training data; choose a data set with --dataset, or remove this task"
        )
    configured = source.config.data.dataset
    if configured and parse_mixture(configured):
        mixed = find_dataset(configured)
        if mixed.fingerprint == source.dataset_hash:
            return mixed
    folders = [manifest.parent for manifest in paths.datasets_dir().glob("[!.]*/manifest.json")]
    if configured:
        folders.append(user_path(configured))
    for folder in folders:
        try:
            fingerprint = Dataset.read(folder).manifest.get("fingerprint")
        except UserError:  # this one is damaged or gone; another may match
            continue
        if fingerprint == source.dataset_hash:
            return Dataset.open(folder)
    raise UserError(
        f"the training data of {source.folder} are not in {paths.datasets_dir()}; choose a data set with --dataset, or "
        "remove this task"
    )
