"""From the name of a run or checkpoint to a model that can be called."""

from pathlib import Path
from typing import NamedTuple

from . import checkpoint, paths
from .config import RunConfig, from_dict
from .data.tokenizer import Tokenizer
from .distributed import choose_device
from .int8 import check_torchao, quantize_int8
from .model import Transformer
from .run_folder import latest_checkpoint


class LanguageModel(NamedTuple):
    """A model and the tokenizer that it was trained with; `model, tokenizer = load_model(...)` takes them apart."""

    model: Transformer
    tokenizer: Tokenizer


def load_model(where: str | Path, device: str = "auto", int8: bool = False) -> LanguageModel:
    """The model of a run (by name or folder: its newest checkpoint) or of one checkpoint's folder, ready to sample.

    Args:
        int8: quantise the weights to eight bits, which needs torchao: a quarter of the memory.

    Raises:
        UserError: nothing there, a damaged checkpoint, or no torchao.
    """
    if int8:
        check_torchao()
    saved = checkpoint.load(latest_checkpoint(str(where), paths.runs()))
    model = Transformer(from_dict(saved.config, RunConfig()).model)
    model.load_state_dict(saved.model)
    model.to(choose_device(device)).eval()
    if int8:
        quantize_int8(model)
    return LanguageModel(model, Tokenizer(saved.tokenizer_file))
