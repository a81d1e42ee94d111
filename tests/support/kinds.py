"""The models and optimizers of the tests that hold for all of them. A new part of the model needs a line here."""

from typing import Any, get_args, get_type_hints

import pytest

from myllm.config import OptimConfig

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
by_optimizer = pytest.mark.parametrize("optimizer", get_args(get_type_hints(OptimConfig)["optimizer"]))
