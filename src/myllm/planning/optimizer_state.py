"""Size of the optimizer's state, and of what Muon's update needs beside it, from the config alone.

AdamW keeps two moments of each parameter, Muon one, all in float32. AdamW's count of steps, 4 bytes per parameter
tensor, is not counted.
"""

from collections import Counter

from myllm.config import ModelConfig, RunConfig

from .flops import stored_parameters

FLOAT = 4


def block_matrices(model: ModelConfig) -> int:
    """Numbers in the matrices inside the blocks: the projections of attention and of the feed-forward network."""
    return sum(_matrices_by_shape(model).values())


def optimizer_state_bytes(config: RunConfig) -> int:
    """All moments of all parameters."""
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
