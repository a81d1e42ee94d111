"""Read folders of `transformers`, such as our exports: Llama, Qwen3 and GPT-2 models."""

from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from myllm.config import ModelConfig, RunConfig, from_dict
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.files import read_json
from myllm.hub.export.tokenizer import TOKENIZER_FILE
from myllm.hub.export.transformers import EXPORT_FILE, TOKENIZER_COPY, is_export
from myllm.hub.export.verify import random_texts

from .architectures import parse_transformers_config
from .external_model import ExternalModel, check_model_config, match_vocabulary
from .weights import import_weights

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Tables that older versions of transformers stored with the weights. We compute them.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
EXPORTED_FIELDS = (
    "vocab_multiple", "dropout_embedding", "dropout_attention_residual", "dropout_ffn", "residual_dtype", "init",
)  # fmt: skip
"""Fields of ModelConfig that config.json cannot express; our exports have them in EXPORT_FILE."""


def read_transformers(folder: Path) -> ExternalModel:
    """
    Raises:
        UserError: an unsupported model, weights that do not match its config, or no vocabulary.
    """
    config, tokenizer_file, notes = read_model_config(folder)
    model_type, tensors = _read_json(folder / CONFIG)["model_type"], _read_tensors(folder)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    if model_type == "gpt2":  # saved with or without the prefix
        prefixes = ("transformer.", "lm_head.")
        tensors = {name if name.startswith(prefixes) else f"transformer.{name}": x for name, x in tensors.items()}
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    weights = import_weights(model_type, config, tensors, folder)
    return ExternalModel(config, weights, tokenizer_file, tuple(notes))


def read_model_config(folder: Path) -> tuple[ModelConfig, Path | None, list[str]]:
    """The model's config, its vocabulary's file (None for the default vocabulary) and notes for the user.

    The weights need not be there yet.

    Raises:
        UserError: as `read_transformers`.
    """
    config = parse_transformers_config(_read_json(folder / CONFIG), str(folder / CONFIG))
    check_model_config(config, folder)
    if is_export(folder):
        saved = _read_json(folder / EXPORT_FILE).get("model", {})
        fields = {name: saved[name] for name in EXPORTED_FIELDS if name in saved} if isinstance(saved, dict) else saved
        config = from_dict({"model": fields}, RunConfig(model=config)).model
    tokenizer_file = _tokenizer_file(folder)
    config, notes = match_vocabulary(config, load_tokenizer(tokenizer_file).vocab_size, folder)
    return config, tokenizer_file, notes


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"weight_map of {folder / INDEX} is not an object of file names; download the file again")
        names = sorted(set(weight_map.values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise UserError(
            f"{folder} has no {WEIGHTS} and no {INDEX}; convert weights of another format with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / Path(name).name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}; download the file again") from None
    return tensors


def _tokenizer_file(folder: Path) -> Path | None:
    for name in (TOKENIZER_COPY, TOKENIZER_FILE):
        if (folder / name).is_file():
            return None if _is_default_vocabulary(folder / name) else folder / name
    raise UserError(
        f"{folder} has no {TOKENIZER_FILE}; write it with "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers"
    )


def _is_default_vocabulary(file: Path) -> bool:
    """True if a tokenizer.json is GPT-2's vocabulary: it has the same tokens, and the same ids for unusual texts."""
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
