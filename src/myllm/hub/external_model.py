"""A model made elsewhere, in the terms of this package, and the checks that every import shares."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from myllm.config import ModelConfig, RunConfig
from myllm.errors import UserError, bullets
from myllm.model.transformer import Transformer
from myllm.planning.config_checks import config_errors


@dataclass(frozen=True)
class ExternalModel:
    """A model that MyLLM did not write, whatever it was read from."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """By our names, in the stored dtype, without the padding of the vocabulary."""
    tokenizer_file: Path | None
    """None for the default vocabulary, which is part of this package."""
    notes: tuple[str, ...] = ()
    """What the user may not expect."""


def check_model_config(config: ModelConfig, source: Path) -> None:
    """
    Raises:
        UserError: a model that MyLLM cannot build.
    """
    if errors := [error for error in config_errors(RunConfig(model=config), 1) if error.startswith("model.")]:
        raise UserError(f"the model in {source} is not supported:\n{bullets(errors)}")


def match_vocabulary(config: ModelConfig, vocab_size: int, source: Path) -> tuple[ModelConfig, list[str]]:
    """The config with the size of the vocabulary, and a note if the model has more rows, as many published models do.

    Raises:
        UserError: the model has fewer rows than the vocabulary has tokens.
    """
    rows = config.vocab_size
    if vocab_size > rows:
        raise UserError(
            f"the tokenizer does not match the model: in {source} the vocabulary has {vocab_size:,} tokens, the model "
            f"{rows:,}"
        )
    notes = [f"the model has {rows:,} rows for {vocab_size:,} tokens; the others are dropped"]
    return replace(config, vocab_size=vocab_size), notes if vocab_size < rows else []


def finalize_weights(external: ExternalModel, source: Path) -> dict[str, Tensor]:
    """The weights in float32, with the padding of the vocabulary.

    Raises:
        UserError: shapes that do not match the config, or values that are not finite.
    """
    config, errors = external.config, []
    weights = {name: tensor.float().contiguous() for name, tensor in external.weights.items()}
    for name in weights.keys() & {"embedding.weight", "head.weight"}:
        padding = weights[name].new_zeros(config.padded_vocab_size - config.vocab_size, *weights[name].shape[1:])
        weights[name] = torch.cat((weights[name], padding))
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        shape = tuple(weights[name].shape) if name in weights else None
        if shape != expected.get(name):
            errors.append(f"{name} has shape {shape}, expected {expected.get(name)}")
        elif not weights[name].isfinite().all():
            errors.append(f"{name} has values that are not finite")
    if errors:
        raise UserError(f"the weights in {source} cannot be used:\n{bullets(errors[:8])}")
    return weights
