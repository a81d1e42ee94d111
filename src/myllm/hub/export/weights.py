"""Our weights under the names and in the layout of `transformers`."""

import torch
from torch import Tensor

from myllm.config import ModelConfig
from myllm.hub.architectures import ModelType, weight_mappings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_transformers(kind: ModelType, config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model of this architecture loads: matrices cut as it has them, the vocabulary's padding left out."""
    made: dict[str, Tensor] = {}
    for piece in weight_mappings(kind, config):
        ours = weights.get(piece.ours)
        if ours is None:
            assert piece.optional, piece.ours
            ours = torch.zeros(sum(piece.rows), dtype=weights["embedding.weight"].dtype)
        for name, part in zip(piece.theirs, ours[: sum(piece.rows)].split(piece.rows), strict=True):
            part = part.t() if piece.transposed else part
            made[name] = part.clone(memory_format=torch.contiguous_format)  # with no memory of the whole behind it
    used = {piece.ours for piece in weight_mappings(kind, config)}
    assert weights.keys() <= used, f"weights without a place: {sorted(weights.keys() - used)}"
    return made


def cast_weights(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The weights in another type."""
    return {name: weight.to(DTYPES[dtype]) for name, weight in weights.items()}
