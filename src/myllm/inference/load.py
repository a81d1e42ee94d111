"""From a run, a checkpoint, a folder of transformers or a model of the Hub to a model that can be called."""

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
from myllm.hub import import_model as importing
from myllm.model.transformer import Transformer
from myllm.paths import user_path

from .int8 import check_torchao, quantize_int8
from .language_model import LanguageModel


class ModelSource(NamedTuple):
    """Where a model is, and what is known of it beside its weights."""

    folder: Path
    """Of the checkpoint, or of the files of a model made elsewhere."""
    home: Path
    """Where what is found out about it belongs: its run, else the checkpoint; the current folder for all others."""
    step: int | None
    config: RunConfig
    """Of its training; all defaults where that is not known."""
    dataset_hash: str | None
    """Of the data that it was trained on, where that is known."""
    saved: Checkpoint | None = None
    """Its checkpoint, whose files for the model have been hashed; None for a model made elsewhere."""


def find_model(where: str | Path) -> ModelSource:
    """The model that a user means: a run's name or folder (its newest checkpoint), a checkpoint's folder, a folder of
    transformers such as our exports, the reference run's checkpoint, or a repository of the Hub, NAMESPACE/NAME or
    NAMESPACE/NAME@REVISION.

    Raises:
        UserError: nothing there.
    """
    path = user_path(where)
    if importing.is_external_model(path):
        paths.warn_if_ambiguous(str(where), path, paths.runs_dir() / where)
        return ModelSource(path, Path(), None, RunConfig(), None)
    try:
        saved = find_checkpoint(str(where), paths.runs_dir())
    except UserError:
        if path.exists() or (paths.runs_dir() / where).exists() or not importing.is_repository(str(where)):
            raise
        folder = importing.resolve_source(str(where), None, lambda line: print(line, file=sys.stderr))
        return ModelSource(folder, Path(), None, RunConfig(), None)
    folder = saved.folder
    return ModelSource(
        folder=folder,
        home=folder.parent.parent if folder.parent.name in ("checkpoints", "best") else folder,
        step=saved.state.step,
        config=saved_config(saved.config, folder / "config.json"),
        dataset_hash=saved.state.data.dataset_hash or None,  # empty: imported, and not trained on anything yet
        saved=saved,
    )


def load_model(
    where: str | Path | ModelSource, device: str = "auto", int8: bool = False, precision: str | None = None
) -> LanguageModel:
    """The model of whatever `find_model` finds, or has found, ready to sample.

    Args:
        int8: quantise the weights to eight bits, which needs torchao: a quarter of the memory.
        precision: of matrix products, as train.precision has it; None: the training's own, as it is on this device.

    Raises:
        UserError: nothing there, a damaged checkpoint, a model that has no counterpart here, no torchao, or a precision
            for eight-bit weights, which have their own.
    """
    if int8 and precision not in (None, "float32"):
        raise UserError(f"precision {precision} is for weights that are floats: leave it out, or int8")
    if int8:
        check_torchao()
    origin = where if isinstance(where, ModelSource) else find_model(where)
    if origin.saved is None:
        foreign = importing.read_external_model(origin.folder)
        loaded = _ready(Transformer(foreign.config), foreign.weights, foreign.tokenizer_file, device)
    else:
        saved = origin.saved
        loaded = _ready(Transformer(origin.config.model), saved.model, saved.tokenizer_file, device)
    if int8:
        quantize_int8(loaded.model)
    else:
        on = loaded.model.embedding.weight.device
        loaded.model.set_compute_dtype(compute_dtype(precision or origin.config.train.precision, on))
    return loaded


def _ready(model: Transformer, weights: dict, tokenizer_file: Path | None, device: str) -> LanguageModel:
    model.load_state_dict(weights)
    model.to(choose_device(device)).eval()
    return LanguageModel(model, load_tokenizer(tokenizer_file))


__all__ = ["LanguageModel", "ModelSource", "find_model", "load_model"]
