"""Begin a run with the weights of another model (`--init.from`): their shape, their vocabulary, the weights.

Only a run without checkpoints reads its source. Once it has one, it resumes from that, and the source may be gone.
"""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from myllm.checkpoint.dcp import read_moments, read_weights, tensor_names
from myllm.checkpoint.integrity import raise_if_damaged
from myllm.checkpoint.layout import OPTIMIZER, list_checkpoints
from myllm.config import ModelConfig, RunConfig, load_config
from myllm.data.dataset import Dataset
from myllm.data.find import find_dataset
from myllm.data.settings import settings_of
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import broadcast_object, group_rank
from myllm.distributed.parallelize import shard_like
from myllm.errors import UserError, bullets
from myllm.files import write_json
from myllm.hub.import_model import read_external_config, read_external_model, source_label
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.paths import RunPaths
from myllm.runs.history import get_text, read_json_or_empty

from .load import ModelSource, find_model

FREE = ("dropout_embedding", "dropout_attention_residual", "dropout_ffn", "residual_dtype", "init")
"""Settings of the model that weights of any kind fit."""


@dataclass(frozen=True)
class Source:
    """What is known of the source before its weights are read."""

    files: ModelSource
    model: ModelConfig
    tokenizer_file: Path | None
    """None: GPT-2's tokenizer."""


def find_source(config: RunConfig) -> Source:
    """Find init.source. A model on the Hub is downloaded.

    Raises:
        UserError: as `find_model`; or the source is this run itself.
    """
    found = find_model(str(config.init.source))
    run = RunPaths.of(config.name).root
    if found.folder.absolute().is_relative_to(run):
        raise UserError(
            f"init.source {config.init.source} is in {run}, the folder of this run; give this run another --name"
        )
    if found.checkpoint:
        return Source(found, found.config.model, found.checkpoint.tokenizer_file)
    return Source(found, *read_external_config(found.folder))


def resumes(config: RunConfig) -> bool:
    """True if the run has checkpoints, so that its source is not read."""
    return not config.train.fresh and bool(list_checkpoints(RunPaths.of(config.name).checkpoints))


def initial_model(config: RunConfig, source: Source | None) -> ModelConfig:
    """The model of the source; with rotary positions, at most with the context of `config`.

    Args:
        source: None: the run resumes with the model that it has.
    """
    if source is None:
        return load_config(RunPaths.of(config.name).config, config).model
    if source.model.position == "rope":
        return replace(source.model, max_seq_len=min(source.model.max_seq_len, config.model.max_seq_len))
    return source.model


def check_fits(source: Source, config: RunConfig, dataset: Dataset | None = None) -> None:
    """Check that a run can begin with the weights of its source.

    Args:
        dataset: None: the one that the config names, or will prepare.

    Raises:
        UserError: other settings of the model, or another tokenizer.
    """
    theirs, ours = asdict(source.model), asdict(config.model)
    free = FREE + ("max_seq_len",) * (source.model.position == "rope")
    differences = [
        f"model.{name} is {theirs[name]} in the source, {ours[name]} in the config"
        for name in theirs
        if theirs[name] != ours[name] and name not in free
    ]
    if differences:
        raise UserError(
            f"the weights of {config.init.source} do not fit this config:\n{bullets(differences)}\n"
            "remove these settings: the shape of the model comes from its weights"
        )
    if dataset is None and config.data.dataset is not None:
        dataset = find_dataset(config.data.dataset, allow_incomplete=True)
    wanted = load_tokenizer(source.tokenizer_file)
    found = dataset.tokenizer() if dataset else load_tokenizer(config.data.tokenizer)
    if found.sha256 != wanted.sha256:
        raise _wrong_tokenizer(config, dataset, found, wanted, source.tokenizer_file)


def _wrong_tokenizer(
    config: RunConfig, dataset: Dataset | None, found: Tokenizer, wanted: Tokenizer, file: Path | None
) -> UserError:
    name = shlex.quote(str(file)) if file else wanted.name
    remedy = f"give --data.tokenizer {name}"
    if dataset:
        source = shlex.quote(settings_of(dataset, config.data).source)
        remedy = f"prepare data with that one: myllm data prepare {source} --tokenizer {name}"
    return UserError(
        f"{f'the data set {dataset.name} was made with' if dataset else 'data.tokenizer is'} {found.name} "
        f"({found.vocab_size:,} tokens), but the weights of {config.init.source} belong to {wanted.name} "
        f"({wanted.vocab_size:,} tokens); {remedy}"
    )


def load_initial_weights(
    config: RunConfig,
    run: RunPaths,
    dataset: Dataset,
    model: Transformer,
    optimizer: ScheduledOptimizer,
    log: Callable[[str], None],
) -> None:
    """Fill the model, which may be sharded, and with init.keep_optimizer the optimizer. Every rank takes part.

    Args:
        run: its imported.json gets the origin of the weights.

    Raises:
        UserError: the source is missing, damaged or does not fit.
    """
    initial = find_source(config)
    check_fits(initial, config, dataset)
    source = initial.files
    if source.checkpoint:  # training may have saved a newer one meanwhile: all ranks take rank 0's
        source = find_model(broadcast_object(source.folder))
        read_weights(source.folder, model)
    else:
        weights = read_external_model(source.folder).weights
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(shard_like(weights[name], tensor))
    if config.init.keep_optimizer:
        _load_moments(source, config, optimizer)
    label = _label(config, source)
    if group_rank(None) == 0:
        run.root.mkdir(parents=True, exist_ok=True)
        write_json(run.imported, {"source": label})
    log(f"begins with the weights of {label}, from {source.folder}")


def _load_moments(source: ModelSource, config: RunConfig, optimizer: ScheduledOptimizer) -> None:
    name, folder = config.init.source, source.folder
    if not source.checkpoint or not tensor_names(folder / OPTIMIZER):
        raise UserError(
            f"init.keep_optimizer: {name} has no optimizer state, only weights; remove --init.keep-optimizer"
        )
    if source.config.optim.optimizer != config.optim.optimizer:
        raise UserError(
            f"init.keep_optimizer: {name} was trained with {source.config.optim.optimizer}, and optim.optimizer is "
            f"{config.optim.optimizer}; give --optim.optimizer {source.config.optim.optimizer}, or remove "
            "--init.keep-optimizer"
        )
    raise_if_damaged(folder, (f"{OPTIMIZER}/",), check_name=False)
    read_moments(folder, optimizer)


def _label(config: RunConfig, source: ModelSource) -> str:
    """The source for model cards: the model from which its own run began, if any, else its run or repository."""
    if not source.checkpoint:
        return source_label(str(config.init.source), None)
    origin = get_text(read_json_or_empty(RunPaths(source.folder.parent.parent).imported), "source")
    return origin or f"{source.config.name}, step {source.step:,}"
