"""Parameters, FLOPs and optimizer state of a model, from its config alone."""

from collections import Counter

from myllm.config import ModelConfig, RunConfig

FLOAT = 4


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameters by part, without the padding of the vocabulary. A tied head counts once, as the embedding."""
    d, head_size, layers, bias = model.d_model, model.head_size, model.n_layers, int(model.bias)
    queries = model.n_heads * head_size
    qkv = queries + 2 * model.kv_heads * head_size
    up = model.d_ff * (2 if model.activation == "swiglu" else 1)
    norm = d * (1 + bias) if model.norm == "layernorm" else d
    qk_norm = 2 * head_size if model.qk_norm else 0
    return {
        "embedding": model.vocab_size * d,
        "positions": model.max_seq_len * d if model.position == "learned" else 0,
        "attention": layers * (d * qkv + bias * qkv + queries * d + bias * d + qk_norm),
        "feed-forward": layers * (d * up + bias * up + model.d_ff * d + bias * d),
        "norms": layers * 2 * norm + norm * (2 if model.embedding_norm else 1),
        "residual scales": layers if model.residual_scales else 0,
        "head": 0 if model.tie_embeddings else model.vocab_size * d,
    }


def n_parameters(model: ModelConfig) -> int:
    return sum(parameters_by_part(model).values())


def stored_parameters(model: ModelConfig) -> int:
    """`n_parameters` with the rows that pad the vocabulary."""
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model
    return n_parameters(model) + padding * (1 if model.tie_embeddings else 2)


def flops_per_token(model: ModelConfig) -> int:
    """Training FLOPs per token: 6 N + 12 n_layers d_attention T.

    N is the number of parameters that a token is multiplied with, biases and norms included: the head once, tied or
    not, but neither learned positions nor an untied input embedding, which are lookups. Attention counts in full though
    a causal kernel skips half of it, and recomputation does not count. So this is the arithmetic of the model, not of
    the hardware, and MFU is comparable between runs.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    parts = parameters_by_part(model)
    multiplied = sum(parts.values()) - parts["positions"] - (0 if model.tie_embeddings else parts["embedding"])
    attention = 12 * model.n_layers * model.n_heads * model.head_size * model.max_seq_len
    return 6 * multiplied + attention


# -- the optimizer's state --------------------------------------------------------------------------------------------


def block_matrices(model: ModelConfig) -> int:
    """Numbers in the matrices inside the blocks: the projections of attention and of the feed-forward network."""
    return sum(_matrices_by_shape(model).values())


def optimizer_state_bytes(config: RunConfig) -> int:
    """All moments, in float32: AdamW keeps two of each parameter, Muon one. AdamW's step counts are not included."""
    with_one_moment = block_matrices(config.model) if config.optim.optimizer == "muon" else 0
    return FLOAT * (2 * stored_parameters(config.model) - with_one_moment)


def muon_update_bytes(config: RunConfig, ranks: int, width: int) -> int:
    """What an update with Muon holds at most beside weights, gradients and state; 0 for AdamW.

    Matrices of one shape are a batch. The largest one is there twice in float32 and once in the iteration's type; the
    updates of all matrices exist at the end, in that type.

    Args:
        ranks: that share the batches.
        width: bytes per number in the iteration.
    """
    if config.optim.optimizer != "muon":
        return 0
    largest = max(_matrices_by_shape(config.model).values())
    return (2 * FLOAT + width) * largest // ranks + width * block_matrices(config.model)


def _matrices_by_shape(model: ModelConfig) -> Counter[tuple[int, ...]]:
    """Numbers of all matrices inside the blocks, by their sorted sides."""
    d, size = model.d_model, model.head_size
    shapes = [(model.n_heads * size, d)] * 2 + [(model.kv_heads * size, d)] * 2  # q, out; k, v
    shapes += [(model.d_ff, d)] * (3 if model.activation == "swiglu" else 2)
    numbers: Counter[tuple[int, ...]] = Counter()
    for rows, columns in shapes:
        numbers[tuple(sorted((rows, columns)))] += model.n_layers * rows * columns
    return numbers
