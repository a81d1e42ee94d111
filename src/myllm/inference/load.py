"""Load a model for inference: from a run, a checkpoint, a transformers folder or a repository on the Hub."""

import sys
from pathlib import Path
from typing import NamedTuple

from myllm import paths
from myllm.checkpoint.format import Checkpoint
from myllm.checkpoint.locate import find_checkpoint
from myllm.config import RunConfig, saved_config
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import choose_device
from myllm.distributed.precision import compute_dtype
from myllm.errors import UserError
from myllm.hub.import_model import is_external_model, read_external_model, resolve_source
from myllm.model.transformer import Transformer
from myllm.paths import may_be_repository, user_path

from .generate import LanguageModel
from .int8 import check_torchao, quantize_int8


class ModelSource(NamedTuple):
    """Where a model is, and what is known about its training."""

    folder: Path
    """Of the checkpoint, or of the files of an external model."""
    home: Path
    """Where evaluation results belong: the run's folder, a checkpoint's folder, or the current folder."""
    step: int | None
    config: RunConfig
    """Of its training; the defaults if that is unknown."""
    dataset_hash: str | None
    """Of its training data, if known."""
    checkpoint: Checkpoint | None = None
    """With verified model files; None for an external model."""


def find_model(where: str | Path) -> ModelSource:
    """Find the model of a run's name or folder (its newest intact checkpoint), a checkpoint's folder, a transformers
    folder such as an export, the reference run's checkpoint file, or a repository on the Hub, NAMESPACE/NAME or
    NAMESPACE/NAME@REVISION.

    Raises:
        UserError: nothing found, or no checkpoint is intact.
    """
    path = user_path(where)
    if is_external_model(path):
        paths.warn_if_ambiguous(str(where), path, paths.runs_dir() / where)
        return ModelSource(path, Path(), None, RunConfig(), None)
    try:
        checkpoint = find_checkpoint(str(where), paths.runs_dir())
    except UserError:
        if path.exists() or (paths.runs_dir() / where).exists() or not may_be_repository(str(where)):
            raise
        folder = resolve_source(str(where), None, lambda line: print(line, file=sys.stderr))
        return ModelSource(folder, Path(), None, RunConfig(), None)
    folder = checkpoint.folder
    return ModelSource(
        folder=folder,
        home=folder.parent.parent if folder.parent.name in ("checkpoints", "best") else folder,
        step=checkpoint.state.step,
        config=saved_config(checkpoint.config, folder / "config.json"),
        dataset_hash=checkpoint.state.data.dataset_hash or None,  # empty for an imported model
        checkpoint=checkpoint,
    )


def load_model(
    where: str | Path | ModelSource, device: str = "auto", int8: bool = False, precision: str | None = None
) -> LanguageModel:
    """Load a model for inference.

    Args:
        where: as for `find_model`, or its result.
        int8: quantize the weights to int8, a quarter of the memory. Needs torchao.
        precision: of matrix products, as train.precision; None: as in training, if the device supports it.

    Raises:
        UserError: nothing found, a damaged checkpoint, an unsupported architecture, no torchao, or int8 with a
            precision.
    """
    if int8:
        if precision not in (None, "float32"):
            raise UserError(f"precision {precision} is for float weights; give either --precision or --int8")
        check_torchao()
    source = where if isinstance(where, ModelSource) else find_model(where)
    if source.checkpoint:
        config, weights = source.config.model, source.checkpoint.model
        tokenizer_file = source.checkpoint.tokenizer_file
    else:
        external = read_external_model(source.folder)
        config, weights, tokenizer_file = external.config, external.weights, external.tokenizer_file
    chosen = choose_device(device)
    model = Transformer(config)
    model.load_state_dict(weights)
    model.to(chosen).eval()
    if int8:
        quantize_int8(model)
    else:
        model.set_compute_dtype(compute_dtype(precision or source.config.train.precision, chosen))
    return LanguageModel(model, load_tokenizer(tokenizer_file))


__all__ = ["LanguageModel", "ModelSource", "find_model", "load_model"]
