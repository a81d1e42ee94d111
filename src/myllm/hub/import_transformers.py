"""Folders of `transformers`, our exports too: Llama, Qwen3 and GPT-2 models whose every switch has a counterpart."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from myllm.config import ModelConfig, RunConfig, from_dict
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.files import read_json
from myllm.hub.export.tokenizer import TOKENIZER_FILE
from myllm.hub.export.transformers import EXPORT_FILE, TOKENIZER_COPY, is_export
from myllm.hub.export.verify import random_texts
from myllm.planning.validation import config_errors

from .architectures import CLASSES, ModelType, weight_mappings
from .external_model import ExternalModel

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Tables that older versions stored with the weights; computed here.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
LARGE = 2**24
WHOLE = {
    "vocab_size": LARGE, "max_position_embeddings": 2**21, "n_positions": 2**21, "hidden_size": LARGE, "n_embd": LARGE,
    "num_hidden_layers": 10_000, "n_layer": 10_000, "num_attention_heads": LARGE, "n_head": LARGE, "head_dim": LARGE,
    "num_key_value_heads": LARGE, "intermediate_size": LARGE, "n_inner": LARGE,
}  # fmt: skip
"""Settings that are whole numbers, and what is far beyond any model: more would be allocated before it is compared."""
TYPES: tuple[tuple[type, tuple[str, ...], str], ...] = (
    (dict, ("rope_parameters", "rope_scaling"), "an object"),
    (list, ("layer_types",), "a list"),
    (str, ("hidden_act", "activation_function"), "a text"),
    (bool, ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), "true or false"),
    (bool, ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"), "true or false"),
)
OURS = ("vocab_multiple", "dropout_embedding", "dropout_attention_residual", "dropout_ffn", "residual_dtype", "init")
"""What config.json cannot say of a model of ours."""


def read_transformers(folder: Path) -> ExternalModel:
    """
    Raises:
        UserError: another kind of model, a switch that has no counterpart here, weights that do not fit, no vocabulary.
    """
    config, file, notes = read_model_config(folder)
    kind = _read_json(folder / CONFIG)["model_type"]
    return ExternalModel(config, _convert(folder, kind, config, _read_tensors(folder)), file, tuple(notes))


def read_model_config(folder: Path) -> tuple[ModelConfig, Path | None, list[str]]:
    """The model, its vocabulary's file (None: the one that ships with the code), and notes for people. It needs no
    weights, which may have yet to be downloaded.

    Raises:
        UserError: as `read_transformers`.
    """
    config = model_config(_read_json(folder / CONFIG), str(folder / CONFIG))
    if wrong := [fault for fault in config_errors(RunConfig(model=config), 1) if fault.startswith("model.")]:
        raise UserError(f"the model in {folder} cannot be used here:\n" + "\n".join(f"  - {x}" for x in wrong))
    if is_export(folder):
        known = _read_json(folder / EXPORT_FILE).get("model", {})
        ours = {name: known[name] for name in OURS if name in known} if isinstance(known, dict) else known
        config = from_dict({"model": ours}, RunConfig(model=config)).model
    file = _vocabulary(folder)
    tokenizer, notes = load_tokenizer(file), []
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
    return config, file, notes


# -- config.json ------------------------------------------------------------------------------------------------------


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """The model of a config.json.

    Raises:
        UserError: names everything in it that has no counterpart here.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(f"{where} is of a {kind!r} model; what can be imported is {', '.join(CLASSES)}")
    values = {key: value for key, value in values.items() if value is not None}  # as if it were not there
    if wrong := sorted(_type_faults(values)):
        raise UserError(f"{where} cannot be used:\n" + "\n".join(f"  - {fault}" for fault in wrong))
    values |= {key: int(values[key]) for key in values.keys() & WHOLE}
    try:
        if wrong := list(_gpt2_faults(values) if kind == "gpt2" else _llama_faults(values)):
            raise UserError(f"the model of {where} has no counterpart here:\n" + "\n".join(f"  - {x}" for x in wrong))
        return _gpt2(values) if kind == "gpt2" else _llama(values)
    except KeyError as error:
        raise UserError(f"{where} does not say {error}") from None


def _type_faults(values: dict[str, Any]) -> Iterator[str]:
    """What is of another type than transformers writes, or of a size that no model has."""
    for key in values.keys() & WHOLE:
        value, most = values[key], WHOLE[key]
        if not _is_number(value) or not 1 <= value <= most or value % 1:
            yield f"{key} is {value!r:.40}, expected a whole number from 1 to {most:,}"
    for kind, keys, expected in TYPES:
        for key in values.keys() & keys:
            if not isinstance(values[key], kind):
                yield f"{key} is {values[key]!r:.40}, expected {expected}"
    rope = values.get("rope_parameters")
    numbers = {key: values.get(key) for key in ("rms_norm_eps", "layer_norm_epsilon", "rope_theta")}
    if isinstance(rope, dict):
        numbers["rope_parameters.rope_theta"] = rope.get("rope_theta")
        if inner := [key for key, value in rope.items() if isinstance(value, dict)]:
            yield f"rope_parameters has one set for each of {', '.join(inner)}, expected one for all layers"
    for key, value in numbers.items():
        if value is not None and not (_is_number(value) and 0 < value < 1e30):
            yield f"{key} is {value!r:.40}, expected a number above 0"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"the weight_map of {folder / INDEX} is no object of file names; get the file again")
        names = sorted(set(places.values()))
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


def _convert(folder: Path, kind: ModelType, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    if kind == "gpt2":  # saved with and without the name of the whole
        tensors = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
            for name, tensor in tensors.items()
        }
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    converted: dict[str, Tensor] = {}
    wrong: list[str] = []
    for piece in weight_mappings(kind, config):
        found = [tensors.pop(name, None) for name in piece.theirs]
        if piece.optional and any(tensor is None for tensor in found):  # a bias that some of its linears do not have
            found = [
                torch.zeros(rows) if tensor is None else tensor for tensor, rows in zip(found, piece.rows, strict=True)
            ]
        wrong += [f"{name} is missing" for name, tensor in zip(piece.theirs, found, strict=True) if tensor is None]
        parts = [tensor for tensor in found if tensor is not None]
        if len(parts) == len(found):
            if piece.transposed:
                parts = [part.t() for part in parts]
            if piece.ours in ("embedding.weight", "head.weight"):
                parts = [part[: config.vocab_size] for part in parts]
            converted[piece.ours] = torch.cat(parts)
            if converted[piece.ours].shape[0] != sum(piece.rows):
                wrong.append(
                    f"{', '.join(piece.theirs)}: {converted[piece.ours].shape[0]:,} rows, not {sum(piece.rows):,}"
                )
    wrong += [f"{name} has no place in the model" for name in sorted(tensors)]
    if wrong:
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG}:\n" + "\n".join(f"  - {x}" for x in wrong[:8])
        )
    return converted


# -- the vocabulary ---------------------------------------------------------------------------------------------------


def _vocabulary(folder: Path) -> Path | None:
    """The file to go on with; None where it is the one that ships with the code."""
    for name in (TOKENIZER_COPY, TOKENIZER_FILE):
        if (folder / name).is_file():
            return None if _is_default(folder / name) else folder / name
    raise UserError(
        f"{folder} has no {TOKENIZER_FILE}; transformers writes one with "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _is_default(file: Path) -> bool:
    """Whether a tokenizer.json is GPT-2's vocabulary: the same tokens by id, and the same ids for odd texts."""
    theirs, ours = load_tokenizer(file), load_tokenizer()
    if (theirs.vocab_size, theirs.end_of_text) != (ours.vocab_size, ours.end_of_text):
        return False
    if any(theirs.decode_bytes([i]) != ours.decode_bytes([i]) for i in range(ours.vocab_size)):
        return False
    return all(theirs.encode(text).tolist() == ours.encode(text).tolist() for text in random_texts())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
