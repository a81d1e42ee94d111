"""The published checkpoint of the reference run, LF_LLM-269M: one `pytorch_model.pth`.

A `torch.save` of a dict: `model_state_dict`, optimizer and scheduler state, `step`, random state, and `hParams`, a
pickled dataclass of a module `src.params`. Only tensors and plain values are read; that one class becomes a record
without methods, and a file that names anything else is refused unread.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from myllm.config import ModelConfig
from myllm.data.sources.hub_listing import first_line
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError

from .external_model import ExternalModel

CHECKPOINT = "pytorch_model.pth"
MODULE = "src.params."
# Numbers and arrays of NumPy, such as a scheduler or random state may hold: of no use here, so they become records too.
NUMPY = re.compile(r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+)")
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DDP put in front of names."""


class Record:
    """Named values, in place of a class that is not here. However it is made, nothing is done."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_lf_llm(file: Path) -> ExternalModel:
    """
    Raises:
        UserError: no such checkpoint, or one that would run code.
    """
    content = _load(file)
    faults = [key for key in ("model_state_dict", "hParams") if key not in content]
    if faults:
        raise UserError(
            f"{file} holds {', '.join(map(str, list(content)[:8])) or 'nothing'}, but no {' and no '.join(faults)}: "
            "expected a checkpoint of the reference run"
        )
    weights = _weights(file, content["model_state_dict"])
    config = _model_config(file, content["hParams"], weights)
    notes = [f"made at its step {content.get('step')}"]
    converted, tokens = _convert(file, config, weights), load_tokenizer().vocab_size
    if config.vocab_size > tokens:  # a padded vocabulary
        notes.append(f"the model has {config.vocab_size:,} rows for {tokens:,} tokens: the others are left out")
        config = replace(config, vocab_size=tokens)
        padded = [name for name in ("embedding.weight", "head.weight") if name in converted]
        converted |= {name: converted[name][:tokens] for name in padded}
    elif config.vocab_size < tokens:
        raise UserError(f"{file} has {config.vocab_size:,} tokens; a checkpoint of the reference run has {tokens:,}")
    return ExternalModel(config, converted, None, tuple(notes))


def _weights(file: Path, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise UserError(f"the model_state_dict of {file} is no dict of tensors by name")
    return {_plain_name(name): tensor for name, tensor in found.items()}


def _plain_name(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _load(file: Path) -> dict[str, Any]:
    try:
        # Every name that the pickle asks for beyond what torch knows to be plain data.
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        odd = sorted(name for name in unsafe if not name.startswith(MODULE) and not NUMPY.fullmatch(name))
        if odd:
            raise UserError(
                f"{file} asks for {', '.join(odd)}, which loading would run; it was not opened. A checkpoint needs "
                "tensors and plain values only: get it from its author again, or do not use it"
            )
        with torch.serialization.safe_globals([(Record, name) for name in unsafe]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a damaged pickle raises depends on the byte
        if isinstance(error, OSError):
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        raise UserError(f"{file} cannot be read as a checkpoint: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a dict with model_state_dict and hParams")
    return content


def _model_config(file: Path, settings: Any, weights: dict[str, Tensor]) -> ModelConfig:
    values = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    if missing := [name for name in HPARAMS if not isinstance(values.get(name), int)]:
        raise UserError(f"the hParams of {file} have no {', '.join(missing)}; they have {', '.join(values) or 'none'}")
    up, embedding = weights.get("transformer_blocks.0.ffn.net.0.weight"), weights.get("embd.weight")
    if up is None or embedding is None or up.ndim != 2:
        raise UserError(f"{file} has other weights than the reference run: {', '.join(list(weights)[:3])}, ...")
    tied = torch.equal(weights.get("out_proj.weight", embedding), embedding)
    return ModelConfig(
        vocab_size=values["n_vocab"], max_seq_len=values["n_ctx"], d_model=values["n_embd"],
        n_heads=values["n_head"], n_layers=values["n_layer"], d_ff=up.shape[0] // 2, bias=True, tie_embeddings=tied,
        dropout_ffn=float(values.get("ffn_act_pdrop") or 0),
        dropout_attention_residual=float(values.get("attn_res_pdrop") or 0), init="reference",
    )  # fmt: skip


def _convert(file: Path, config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"embd.weight": "embedding.weight", "norm.weight": "norm.weight", "out_proj.weight": "head.weight"}
    inner = {
        "norm1.weight": "attention_norm.weight", "norm2.weight": "feed_forward_norm.weight",
        "attn.qkv_proj.weight": "attention.qkv_proj.weight", "attn.qkv_proj.bias": "attention.qkv_proj.bias",
        "attn.out_proj.weight": "attention.out_proj.weight", "attn.out_proj.bias": "attention.out_proj.bias",
        "ffn.net.0.weight": "feed_forward.up_proj.weight", "ffn.net.0.bias": "feed_forward.up_proj.bias",
        "ffn.net.3.weight": "feed_forward.down_proj.weight", "ffn.net.3.bias": "feed_forward.down_proj.bias",
    }  # fmt: skip
    for i in range(config.n_layers):
        names |= {f"transformer_blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in inner.items()}
    if config.tie_embeddings:
        del names["out_proj.weight"]
        weights = {name: tensor for name, tensor in weights.items() if name != "out_proj.weight"}
    if names.keys() != weights.keys():
        odd = sorted(names.keys() ^ weights.keys())
        raise UserError(f"{file} does not have the weights of its hParams: {', '.join(odd[:5])} are not in both")
    converted = {names[theirs]: tensor for theirs, tensor in weights.items()}
    for name in converted:
        if "up_proj" in name:  # theirs has up first, then the gate
            up, gate = converted[name].chunk(2)
            converted[name] = torch.cat((gate, up))
    return converted
