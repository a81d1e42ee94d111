"""Parameters and FLOPs of a model, from its config alone."""

from myllm.config import ModelConfig


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameters by part, before the vocabulary is padded. A tied head counts once, as the embedding."""
    d, size, layers = model.d_model, model.head_size, model.n_layers
    bias = int(model.bias)
    heads = model.n_heads * size  # width of the queries
    qkv = heads + 2 * model.kv_heads * size
    up = model.d_ff * (2 if model.activation == "swiglu" else 1)
    norm = d * (1 + bias) if model.norm == "layernorm" else d
    return {
        "embedding": model.vocab_size * d,
        "positions": model.max_seq_len * d if model.position == "learned" else 0,
        "attention": layers * (d * qkv + bias * qkv + heads * d + bias * d + (2 * size if model.qk_norm else 0)),
        "feed-forward": layers * (d * up + bias * up + model.d_ff * d + bias * d),
        "norms": layers * 2 * norm + norm,
        "head": 0 if model.tie_embeddings else model.vocab_size * d,
    }


def n_parameters(model: ModelConfig) -> int:
    return sum(parameters_by_part(model).values())


def stored_parameters(model: ModelConfig) -> int:
    """As n_parameters, with the rows that pad the vocabulary."""
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model
    return n_parameters(model) + padding * (1 if model.tie_embeddings else 2)


def flops_per_token(model: ModelConfig) -> int:
    """Training FLOPs a token: 6 N + 12 n_layers d_attention T.

    N counts the parameters a token is multiplied with: the head once, tied or not, and neither learned positions nor
    an untied input embedding, which are looked up. Biases and norms are in N. Attention counts in full though a causal
    kernel skips half of it; what is computed again (by activation checkpointing, or inside a fused attention kernel)
    does not count. So this is the model's arithmetic, not the hardware's, and MFU is comparable between runs.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    parts = parameters_by_part(model)
    multiplied = sum(parts.values()) - parts["positions"] - (0 if model.tie_embeddings else parts["embedding"])
    attention = 12 * model.n_layers * model.n_heads * model.head_size * model.max_seq_len
    return 6 * multiplied + attention
