"""Further validation sets (`eval.validation_sets`): held-out text of other data sets, with rows of their own."""

import re
from collections.abc import Sequence

from myllm.data.dataset import Dataset
from myllm.data.find import find_dataset
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.errors import UserError

_NAME = re.compile(r"[\w.-]+")


def parse_validation_sets(words: Sequence[str]) -> dict[str, str]:
    """Data sets by the names of their rows, from words such as code=files-src.

    Raises:
        UserError: a word of another form, or a name twice.
    """
    sets: dict[str, str] = {}
    for word in words:
        name, _, dataset = word.partition("=")
        if not _NAME.fullmatch(name) or not dataset:
            raise UserError(f"eval.validation_sets {word!r}: expected NAME=DATASET, such as code=files-src")
        if name in sets:
            raise UserError(f"eval.validation_sets has the name {name} twice; give each set a name of its own")
        sets[name] = dataset
    return sets


def open_validation_sets(words: Sequence[str], trained_on: Dataset, seq_len: int) -> dict[str, Dataset]:
    """The data sets of `eval.validation_sets`, by the names of their rows.

    Raises:
        UserError: not found, damaged, too short, tokenized with another vocabulary, or its name is that of a component.
    """
    sets = {name: find_dataset(dataset) for name, dataset in parse_validation_sets(words).items()}
    vocabulary = trained_on.manifest["tokenizer"]
    for name, dataset in sets.items():
        other = dataset.manifest["tokenizer"]
        if isinstance(trained_on, MixedDataset) and name in trained_on.labels:
            raise UserError(f"eval.validation_sets: {name} is a component of the mixture already; give another name")
        if other["sha256"] != vocabulary["sha256"]:
            raise UserError(
                f"eval.validation_sets: {dataset.name} was tokenized with {other['name']}, but the run uses "
                f"{vocabulary['name']}; prepare it with that one"
            )
        if dataset.val.tokens < seq_len + 1:
            raise UserError(
                f"eval.validation_sets: {dataset.name} holds out {dataset.val.tokens:,} tokens, too few for one "
                f"sequence of {seq_len:,} and its last target; prepare it with a higher data.val_tokens or more text"
            )
    return sets
