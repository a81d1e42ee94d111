"""Size of the optimizer's state, from the config alone.

AdamW keeps two moments of each parameter, Muon one, all in float32. AdamW's count of steps is left out: 4 bytes per
parameter tensor.
"""

from myllm.config import ModelConfig, RunConfig

from .flops import stored_parameters

FLOAT = 4


def block_matrices(model: ModelConfig) -> int:
    """Numbers in the matrices inside the blocks: the projections of attention and of the feed-forward network."""
    d, size = model.d_model, model.head_size
    attention = d * (2 * model.n_heads + 2 * model.kv_heads) * size
    feed_forward = d * model.d_ff * (3 if model.activation == "swiglu" else 2)
    return model.n_layers * (attention + feed_forward)


def optimizer_state_bytes(config: RunConfig) -> int:
    """All moments of all parameters."""
    with_one_moment = block_matrices(config.model) if config.optim.optimizer == "muon" else 0
    return FLOAT * (2 * stored_parameters(config.model) - with_one_moment)
