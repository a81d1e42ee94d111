"""One table of models for all tests that must hold for every part of the model: a new part is a line here."""

from typing import Any

import pytest

MODEL_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt2": {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    "relu2, untied": {"position": "learned", "norm": "layernorm", "activation": "relu2", "tie_embeddings": False},
    "grouped, qk-norm": {"n_kv_heads": 2, "head_dim": 10, "qk_norm": True, "bias": True},
    "embedding norm, scales": {"embedding_norm": True, "residual_scales": True, "tie_embeddings": False},
}
"""Changes of a ModelConfig with four heads."""
WITHOUT_PARTS = {
    "vocab_size", "vocab_multiple", "max_seq_len", "d_model", "n_layers", "n_heads", "d_ff", "rope_theta",
    "rope_scaling", "norm_eps", "dropout_embedding", "dropout_attention_residual", "dropout_ffn", "residual_dtype",
    "init",
}  # fmt: skip
"""Settings that add no part: sizes, numbers, types."""

by_model_kind = pytest.mark.parametrize("kind", list(MODEL_KINDS.values()), ids=list(MODEL_KINDS))
