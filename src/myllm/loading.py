"""From a run, a checkpoint, a folder of transformers or a model of the Hub to a model that can be called."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from . import checkpoint, importing, paths
from .config import RunConfig, saved_config
from .data.tokenizer import Tokenizer
from .distributed import choose_device
from .errors import UserError
from .int8 import check_torchao, quantize_int8
from .language_model import LanguageModel
from .model import Transformer
from .run_folder import latest_checkpoint


class Origin(NamedTuple):
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


def find_model(where: str | Path) -> Origin:
    """The model that a user means: a run's name or folder (its newest checkpoint), a checkpoint's folder, a folder of
    transformers such as our exports, the reference run's checkpoint, or a repository of the Hub, NAMESPACE/NAME or
    NAMESPACE/NAME@REVISION.

    Raises:
        UserError: nothing there.
    """
    path = Path(where).expanduser()
    if importing.is_foreign(path):
        return Origin(path, Path(), None, RunConfig(), None)
    try:
        folder = latest_checkpoint(str(where), paths.runs())
    except UserError:
        if path.exists() or (paths.runs() / where).exists() or not importing.is_repository(str(where)):
            raise
        folder = importing.find(str(where), None, lambda line: print(line, file=sys.stderr))
        return Origin(folder, Path(), None, RunConfig(), None)
    state, config = checkpoint.read_state(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Origin(
        folder=folder,
        home=folder.parent.parent if folder.parent.name in ("checkpoints", "best") else folder,
        step=state.step,
        config=saved_config(config, folder / "config.json"),
        dataset_hash=state.data.dataset_hash or None,  # empty: imported, and not trained on anything yet
    )


def load_model(where: str | Path, device: str = "auto", int8: bool = False) -> LanguageModel:
    """The model of whatever `find_model` finds, ready to sample.

    Args:
        int8: quantise the weights to eight bits, which needs torchao: a quarter of the memory.

    Raises:
        UserError: nothing there, a damaged checkpoint, a model that has no counterpart here, or no torchao.
    """
    if int8:
        check_torchao()
    folder = find_model(where).folder
    if not (folder / checkpoint.MANIFEST).is_file():
        foreign = importing.read(folder)
        return _ready(Transformer(foreign.config), foreign.weights, foreign.tokenizer_file, device, int8)
    saved = checkpoint.load(folder)
    config = saved_config(saved.config, folder / "config.json").model
    return _ready(Transformer(config), saved.model, saved.tokenizer_file, device, int8)


def _ready(model: Transformer, weights: dict, tokenizer_file: Path | None, device: str, int8: bool) -> LanguageModel:
    model.load_state_dict(weights)
    model.to(choose_device(device)).eval()
    if int8:
        quantize_int8(model)
    return LanguageModel(model, Tokenizer(tokenizer_file))


__all__ = ["LanguageModel", "Origin", "find_model", "load_model"]
