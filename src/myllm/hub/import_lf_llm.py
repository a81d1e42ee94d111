"""Read the published checkpoint of the reference run, LF_LLM-269M: one `pytorch_model.pth`.

It is a `torch.save` of a dict: `model_state_dict`, optimizer and scheduler state, `step`, random state, and `hParams`,
a pickled dataclass of a module `src.params`. Only tensors and plain values are loaded. That class becomes a record
without methods, and a file that names any other class is rejected before anything of it is loaded.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from myllm.config import ModelConfig
from myllm.data.sources.hub_listing import first_line
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError

from .external_model import ExternalModel, check_model_config, match_vocabulary
from .weights import import_weights

CHECKPOINT = "pytorch_model.pth"
MODULE = "src.params."
# NumPy scalars and arrays, which a scheduler or random state may hold. They are not needed and become records too.
NUMPY = re.compile(r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+)")
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")


class Record:
    """Named values in place of a pickled object. Constructing it runs no code of the pickle."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_lf_llm(file: Path) -> ExternalModel:
    """
    Raises:
        UserError: not a checkpoint of the reference run, or one that would run code.
    """
    content = _load(file)
    if missing := [key for key in ("model_state_dict", "hParams") if key not in content]:
        raise UserError(
            f"{file} has the keys {', '.join(map(str, list(content)[:8])) or '(none)'}, but not {', '.join(missing)}; "
            "expected a checkpoint of the reference run"
        )
    tensors = _tensors(file, content["model_state_dict"])
    config = _model_config(file, content["hParams"], tensors)
    check_model_config(config, file)
    config, notes = match_vocabulary(config, load_tokenizer().vocab_size, file)
    if config.tie_embeddings:
        tensors.pop("out_proj.weight", None)
    weights = import_weights("lf-llm", config, tensors, file)
    for name in weights:
        if "up_proj" in name:
            up, gate = weights[name].chunk(2)
            weights[name] = torch.cat((gate, up))
    return ExternalModel(config, weights, None, (f"saved at its step {content.get('step')}", *notes))


def _load(file: Path) -> dict[str, Any]:
    try:
        # All classes and functions in the pickle, except those that torch knows to be plain data.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        unsafe = sorted(name for name in names if not name.startswith(MODULE) and not NUMPY.fullmatch(name))
        if unsafe:
            raise UserError(
                f"{file} was not loaded, because that would run {', '.join(unsafe)}. A checkpoint needs only tensors "
                "and plain values: download it again from its author, or do not use it"
            )
        with torch.serialization.safe_globals([(Record, name) for name in names]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, OSError):
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        raise UserError(f"{file} is not a readable checkpoint: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a dict with model_state_dict and hParams")
    return content


def _tensors(file: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"model_state_dict of {file} is not a dict of tensors by name")
    wrappers = {"module", "_orig_mod"}  # of DDP and torch.compile
    return {".".join(part for part in name.split(".") if part not in wrappers): state[name] for name in state}


def _model_config(file: Path, hparams: Any, tensors: dict[str, Tensor]) -> ModelConfig:
    values = hparams if isinstance(hparams, dict) else getattr(hparams, "__dict__", {})
    if missing := [name for name in HPARAMS if not isinstance(values.get(name), int)]:
        raise UserError(f"hParams of {file} have no {', '.join(missing)}; they have {', '.join(values) or 'no values'}")
    up, embedding = tensors.get("transformer_blocks.0.ffn.net.0.weight"), tensors.get("embd.weight")
    if up is None or embedding is None or up.ndim != 2:
        names = ", ".join(list(tensors)[:3]) or "none"
        raise UserError(f"{file} does not have the weights of the reference run: its first names are {names}")
    return ModelConfig(
        vocab_size=values["n_vocab"], max_seq_len=values["n_ctx"], d_model=values["n_embd"],
        n_heads=values["n_head"], n_layers=values["n_layer"], d_ff=up.shape[0] // 2, bias=True,
        tie_embeddings=torch.equal(tensors.get("out_proj.weight", embedding), embedding),
        dropout_ffn=float(values.get("ffn_act_pdrop") or 0),
        dropout_attention_residual=float(values.get("attn_res_pdrop") or 0), init="reference",
    )  # fmt: skip
