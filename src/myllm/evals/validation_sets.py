"""Further validation sets (`eval.validation_sets`): held-out text of data sets, and sources, with rows of their own."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.find import find_dataset, find_dataset_folder
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.settings import vocabulary
from myllm.data.sources.catalog import CORPORA
from myllm.data.sources.source import check_source
from myllm.data.token_stream import TokenStream
from myllm.distributed.launcher import local_rank
from myllm.errors import UserError

_NAME = re.compile(r"[\w.-]+")
HELD_OUT = 2
"""Tokens that the preparation holds out of a set that is measured whole: the fewest possible."""


class WholeText(Dataset):
    """A data set that no run trains on, all of it held out."""

    @property
    def val(self) -> TokenStream:
        return self.train


def parse_validation_sets(words: Sequence[str]) -> dict[str, str]:
    """Data sets and sources by the names of their rows, from words such as code=files-src.

    Raises:
        UserError: a word of another form, or a name twice.
    """
    sets: dict[str, str] = {}
    for word in words:
        name, _, text = word.partition("=")
        if not _NAME.fullmatch(name) or not text:
            raise UserError(
                f"eval.validation_sets {word!r}: expected NAME=DATASET or NAME=SOURCE, such as code=files-src or "
                "code=files:/src"
            )
        if name in sets:
            raise UserError(f"eval.validation_sets has the name {name} twice; give each set a name of its own")
        sets[name] = text
    return sets


def check_validation_sets(config: RunConfig) -> None:
    """Check the names without reading text or asking a server.

    Raises:
        UserError: neither a prepared data set nor a source.
    """
    for text in parse_validation_sets(config.eval.validation_sets).values():
        if not _is_prepared(text):
            check_source(text, config.data.suffixes)


def _is_prepared(text: str) -> bool:
    """Whether it names a prepared data set, and not a source."""
    is_source = ":" in text or text == "python-stdlib" or text in CORPORA
    try:
        folder = find_dataset_folder(text)
    except UserError:
        if not is_source:
            raise
        return False
    # The name of a known source begins that of its data sets, and an earlier start may have made one for validation.
    return not is_source or Dataset.read(folder).manifest["val_tokens"] > HELD_OUT


def open_validation_sets(config: RunConfig, trained_on: Dataset, log: Callable[[str], None]) -> dict[str, Dataset]:
    """The data sets of `eval.validation_sets`, by the names of their rows. Every rank calls it.

    Raises:
        UserError: not found, damaged, too short, tokenized with another vocabulary, text that the run trains on, or
            its name is that of a component.
    """
    from myllm.distributed.collectives import run_on_all_ranks  # loads torch

    sets: dict[str, Dataset] = {}
    seq_len = config.model.max_seq_len
    for name, text in parse_validation_sets(config.eval.validation_sets).items():
        if isinstance(trained_on, MixedDataset) and name in trained_on.labels:
            raise UserError(f"eval.validation_sets: {name} is a component of the mixture already; give another name")
        prepared = run_on_all_ranks(partial(_is_prepared, text))[0]
        dataset = find_dataset(text) if prepared else _prepare(name, text, config, trained_on, log)
        own, other = trained_on.manifest["tokenizer"], dataset.manifest["tokenizer"]
        if other["sha256"] != own["sha256"]:
            raise UserError(
                f"eval.validation_sets: {dataset.name} was tokenized with {other['name']}, but the run uses "
                f"{own['name']}; prepare it with that one"
            )
        if dataset.val.tokens < seq_len + 1:
            more = "prepare it with a higher data.val_tokens or more text" if prepared else "add text"
            raise UserError(
                f"eval.validation_sets: {dataset.name} holds out {dataset.val.tokens:,} tokens, too few for one "
                f"sequence of {seq_len:,} and its last target; {more}"
            )
        sets[name] = dataset
    return sets


def _prepare(name: str, source: str, config: RunConfig, trained_on: Dataset, log: Callable[[str], None]) -> Dataset:
    """The first eval.validation_tokens of a source, with the run's settings. A process on each machine prepares them,
    unless they are there."""
    from myllm.data.prepare.prepare import prepare
    from myllm.distributed.collectives import run_on_all_ranks

    tokens = config.eval.validation_tokens + 1
    data = replace(
        config.data, source=source, dataset=None, fallback=None, val_tokens=HELD_OUT, target_tokens=tokens,
        tokenizer=vocabulary(trained_on, config.data),
    )  # fmt: skip
    log(f"validation set {name}: at most {tokens:,} tokens of {source}")

    def prepare_on_this_machine() -> None:
        if local_rank() == 0:
            prepare(data, progress=False)

    run_on_all_ranks(prepare_on_this_machine)
    dataset = WholeText.open(prepare(data, progress=False).folder)
    for part in trained_on.components if isinstance(trained_on, MixedDataset) else (trained_on,):
        if part.manifest.get("source_sha256") == dataset.manifest["source_sha256"]:
            raise UserError(
                f"eval.validation_sets: the run trains on {source} itself; its held-out part, {part.name}, is measured "
                f"without {name}"
            )
    return dataset
