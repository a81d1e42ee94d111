"""Export a checkpoint as a GGUF file, for llama.cpp and tools built on it.

Source: ggml-org/llama.cpp, convert_hf_to_gguf.py, for names, types, and the row order of a Llama's queries and keys.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from myllm.config import ModelConfig
from myllm.errors import UserError, require
from myllm.hub.architectures import ModelType, select_architecture
from myllm.hub.weights import export_weights
from myllm.model.rope import rotary_frequencies
from myllm.paths import user_path

from .fold import fold
from .source import ExportSource, atomic_dir
from .tokenizer import fast_tokenizer

ARCHITECTURES = {"llama": "LLAMA", "qwen3": "QWEN3", "gpt2": "GPT2"}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_WORDS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Source: ggml-org/llama.cpp, src/llama-vocab.cpp, for what each name there splits, normalizes and looks up.
SPLIT_PATTERNS = {rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe", rf"{_WORDS}|\p{{N}}|{_REST}": "qwen2"}
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}


def export_gguf(source: ExportSource, to: Path, dtype: str = "float32") -> int:
    """Write the file, read it back and compare each tensor, and only then give it its name.

    Vectors and learned positions stay in float32, as in llama.cpp.

    Returns:
        the number of tensors.

    Raises:
        UserError: a model or vocabulary that the format does not support, or the extra `gguf` is not installed.
    """
    gguf = require("--to-gguf", "gguf", "gguf")
    to, model_type = user_path(to).absolute(), select_architecture(source.config.model)
    if source.config.model.activation == "relu2":
        raise UserError(
            "GGUF has no squared ReLU for this model (model.activation is relu2): llama.cpp computes SiLU or GELU in "
            "its place. Use --to or --to-onnx"
        )
    if source.config.model.rope_scaling and model_type != "llama":
        raise UserError(
            "llama.cpp reads scaled rotary frequencies (model.rope_scaling) of Llama models alone, not of "
            f"{ARCHITECTURES[model_type]}. Use --to or --to-onnx"
        )
    source = fold(source)
    config = source.config.model
    tensors = dict(_tensors(gguf, model_type, config, source.weights))
    with atomic_dir(to) as folder:
        work = folder / to.name
        writer = gguf.GGUFWriter(work, ARCHITECTURES[model_type].lower())
        writer.add_name(source.config.name)
        writer.add_file_type(int(getattr(gguf.LlamaFileType, FILE_TYPES[dtype])))
        _add_settings(writer, model_type, config)
        _add_vocabulary(gguf, writer, source)
        for name, array in tensors.items():
            stored_type = _stored_type(gguf, name, array, dtype)
            writer.add_tensor(name, gguf.quants.quantize(array, stored_type), raw_dtype=stored_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _compare(gguf, work, tensors, dtype)
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(to)
    return len(tensors)


def _tensors(
    gguf: Any, model_type: ModelType, config: ModelConfig, weights: dict[str, Tensor]
) -> Iterator[tuple[str, np.ndarray]]:
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[model_type]), config.n_layers)
    for theirs, tensor in export_weights(model_type, config, weights).items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name, theirs
        array = tensor.float().numpy()
        if model_type == "gpt2" and ".h." in theirs and array.ndim == 2:
            array = array.T  # outputs as rows, unlike in Conv1D
        if model_type == "llama" and "self_attn.q_proj" in theirs:
            array = interleave_rotary_rows(array, config.n_heads)
        if model_type == "llama" and "self_attn.k_proj" in theirs:
            array = interleave_rotary_rows(array, config.kv_heads)
        yield name, np.ascontiguousarray(array)
    if config.rope_scaling:  # llama.cpp divides the plain frequencies by these
        plain = rotary_frequencies(config.head_size, config.rope_theta)
        scaled = rotary_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
        yield "rope_freqs.weight", (plain / scaled).numpy()


def interleave_rotary_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of queries or keys within each head, so that the two dimensions of a rotary pair are neighbors.

    A Llama in GGUF pairs dimension 2i with 2i + 1; ours pairs i with i + K/2.

    Shapes:
        rows (H K, D) or (H K,); returns the same
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])  # (H, 2, K/2, D)
    return halves.swapaxes(1, 2).reshape(rows.shape)  # (H, K/2, 2, D), flattened


def _stored_type(gguf: Any, name: str, array: np.ndarray, dtype: str) -> Any:
    small = array.ndim == 1 or name.startswith("position_embd")
    return getattr(gguf.GGMLQuantizationType, "F32" if small else TYPES[dtype])


def _add_settings(writer: Any, model_type: ModelType, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if model_type == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)


def _add_vocabulary(gguf: Any, writer: Any, source: ExportSource) -> None:
    spec, end = json.loads(fast_tokenizer(source.tokenizer).to_str()), source.tokenizer.end_of_text
    splitter_name = _splitter_name(spec)
    if splitter_name is None:
        raise UserError(
            "GGUF supports byte-level vocabularies that split words as GPT-2's, Llama 3's or Qwen3's do, such as those "
            f"of `myllm tokenizer train`. {source.tokenizer.name} does not (model {spec['model']['type']}, "
            f"pre_tokenizer {(spec['pre_tokenizer'] or {}).get('type')})"
        )
    tokens = [f"[UNUSED{i}]" for i in range(source.config.model.vocab_size)]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in spec["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter_name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)


def _splitter_name(spec: dict[str, Any]) -> str | None:
    """llama.cpp's name for the steps before and around the merges; None if it has none.

    For Qwen3 it does not compose characters (NFC) before it splits, as its own converter accepts too.
    """
    name = None
    match spec["pre_tokenizer"]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            name = "gpt-2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            name = SPLIT_PATTERNS.get(pattern)
    composes = name == "qwen2" and spec["normalizer"] == {"type": "NFC"}
    looks_up_words = bool(spec["model"].get("ignore_merges"))
    fits = spec["model"]["type"] == "BPE" and (composes or not spec["normalizer"])
    return name if fits and looks_up_words == (name == "llama-bpe") else None


def _compare(gguf: Any, file: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wrong = sorted(found.keys() ^ tensors.keys())
    for name in found.keys() & tensors.keys():
        values = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        stored_dtype = torch.float32 if found[name].tensor_type.name == "F32" else getattr(torch, dtype)
        # Rounded by torch, not by the library that wrote the file.
        expected = torch.from_numpy(tensors[name]).to(stored_dtype).float().numpy()
        if values.shape != expected.shape or not np.array_equal(values, expected):
            wrong.append(name)
    if wrong:
        raise UserError(f"the GGUF file does not hold the weights: {', '.join(wrong[:5])} differ. Nothing was exported")
