"""Folders of `transformers`, our exports too: Llama, Qwen3 and GPT-2 models whose every switch has a counterpart."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..exporting.architectures import CLASSES, pieces
from ..exporting.folder import MARK, VOCABULARY, is_export
from ..exporting.parity import random_texts
from ..exporting.tokenizer_files import TOKENIZER_FILE
from .foreign import Foreign

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Tables that older versions stored with the weights; computed here.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
OURS = ("vocab_multiple", "dropout_embedding", "dropout_attention_residual", "dropout_ffn", "init")
"""What config.json cannot say of a model of ours."""


def read_folder(folder: Path) -> Foreign:
    """
    Raises:
        UserError: another kind of model, a switch that has no counterpart here, weights that do not fit, no vocabulary.
    """
    values = _read_json(folder / CONFIG)
    config, kind = model_config(values, str(folder / CONFIG)), values["model_type"]
    if is_export(folder):
        known = _read_json(folder / MARK).get("model", {})
        config = replace(config, **{name: known[name] for name in OURS if name in known})
    tensors = _read_tensors(folder)
    file = _vocabulary(folder)
    tokenizer, notes = Tokenizer(file), []
    if tokenizer.vocab_size < config.vocab_size:
        notes.append(
            f"the model has {config.vocab_size:,} rows for {tokenizer.vocab_size:,} tokens: the others are left out"
        )
        config = replace(config, vocab_size=tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the vocabulary in {folder} has {tokenizer.vocab_size:,} tokens, the model {config.vocab_size:,}: they do "
            "not belong together"
        )
    return Foreign(config, _convert(folder, kind, config, tensors), file, tuple(notes))


# -- config.json ------------------------------------------------------------------------------------------------------


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """The model of a config.json.

    Raises:
        UserError: names everything in it that has no counterpart here.
    """
    kind = values.get("model_type")
    if kind not in CLASSES:
        raise UserError(f"{where} is of a {kind!r} model; what can be imported is {', '.join(CLASSES)}")
    try:
        if faults := list(_gpt2_faults(values) if kind == "gpt2" else _llama_faults(values)):
            raise UserError(f"the model of {where} has no counterpart here:\n" + "\n".join(f"  - {x}" for x in faults))
        return _gpt2(values) if kind == "gpt2" else _llama(values)
    except KeyError as error:
        raise UserError(f"{where} does not say {error}") from None


def _llama_faults(values: dict[str, Any]) -> Iterator[str]:
    if (act := values.get("hidden_act", "silu")) != "silu":
        yield f"hidden_act is {act}, expected silu"
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        yield f"rope_type is {scaling}, expected default"
    if (part := rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1) != 1:
        yield f"partial_rotary_factor is {part}, expected 1"
    if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
        yield "use_sliding_window is true: attention here always sees the whole context"


def _llama(values: dict[str, Any]) -> ModelConfig:
    qwen = values["model_type"] == "qwen3"
    heads, size = values["num_attention_heads"], values["hidden_size"]
    rope = values.get("rope_parameters") or {}
    return ModelConfig(
        vocab_size=values["vocab_size"],
        max_seq_len=values["max_position_embeddings"],
        d_model=size,
        n_layers=values["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=values.get("num_key_value_heads") or (32 if qwen else heads),
        head_dim=values.get("head_dim") or (128 if qwen else size // heads),
        d_ff=values["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        bias=bool(values.get("attention_bias") or values.get("mlp_bias")),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qk_norm=qwen,
    )


def _gpt2_faults(values: dict[str, Any]) -> Iterator[str]:
    if (act := values.get("activation_function", "gelu_new")) not in ("gelu_new", "gelu_pytorch_tanh"):
        yield f"activation_function is {act}, expected gelu_new"
    if not values.get("scale_attn_weights", True):
        yield "scale_attn_weights is false"
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if values.get(name):
            yield f"{name} is true"


def _gpt2(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=values["vocab_size"],
        max_seq_len=values["n_positions"],
        d_model=values["n_embd"],
        n_layers=values["n_layer"],
        n_heads=values["n_head"],
        d_ff=values.get("n_inner") or 4 * values["n_embd"],
        position="learned",
        norm="layernorm",
        norm_eps=float(values.get("layer_norm_epsilon", 1e-5)),
        activation="gelu",
        bias=True,
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
    )


# -- weights ----------------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise UserError(
            f"{folder} has no {WEIGHTS} and no {INDEX}; what is there in another form becomes one with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / Path(name).name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}; get the file again") from None
    return tensors


def _convert(folder: Path, kind: str, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    if kind == "gpt2":  # saved with and without the name of the whole
        tensors = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
            for name, tensor in tensors.items()
        }
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    made, faults = {}, []
    for piece in pieces(kind, config):
        found = [tensors.pop(name, None) for name in piece.theirs]
        if piece.optional and any(each is None for each in found):  # a bias that some of its linears do not have
            found = [torch.zeros(rows) if each is None else each for each, rows in zip(found, piece.rows, strict=True)]
        faults += [f"{name} is missing" for name, each in zip(piece.theirs, found, strict=True) if each is None]
        if all(each is not None for each in found):
            parts = [each.t() if piece.transposed else each for each in found]
            if piece.ours in ("embedding.weight", "head.weight"):
                parts = [part[: config.vocab_size] for part in parts]
            made[piece.ours] = torch.cat(parts)
            if made[piece.ours].shape[0] != sum(piece.rows):
                faults.append(f"{', '.join(piece.theirs)}: {made[piece.ours].shape[0]:,} rows, not {sum(piece.rows):,}")
    faults += [f"{name} has no place in the model" for name in sorted(tensors)]
    if faults:
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG}:\n" + "\n".join(f"  - {x}" for x in faults[:8])
        )
    return made


# -- the vocabulary ---------------------------------------------------------------------------------------------------


def _vocabulary(folder: Path) -> Path | None:
    """The file to go on with; None where it is the one that ships with the code."""
    for name in (VOCABULARY, TOKENIZER_FILE):
        if (folder / name).is_file():
            return None if _is_default(folder / name) else folder / name
    raise UserError(
        f"{folder} has no {TOKENIZER_FILE}; transformers writes one with "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _is_default(file: Path) -> bool:
    """Whether a tokenizer.json is GPT-2's vocabulary: the same tokens by id, and the same ids for odd texts."""
    theirs, ours = Tokenizer(file), Tokenizer()
    if (theirs.vocab_size, theirs.end_of_text) != (ours.vocab_size, ours.end_of_text):
        return False
    if any(theirs.decode_bytes([i]) != ours.decode_bytes([i]) for i in range(ours.vocab_size)):
        return False
    return all(theirs.encode(text).tolist() == ours.encode(text).tolist() for text in random_texts())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no object of settings")
    return values
