"""Rotary position embedding.

Source: Su et al. 2021 (RoFormer), equation 34, in the half-split layout of GPT-NeoX and Llama: dimension i is paired
with i + K/2, not with its neighbour.

Shapes: B batch, H heads, T sequence, K head dimension.
"""

import torch
from torch import Tensor

from .norm import float32


def rotary_tables(max_seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine of every position's angles, and sine, for both dimensions of each pair, in float32.

    The first of a pair takes away the other's part, so its sine is negative.

    Shapes:
        each (max_seq_len, head_dim)
    """
    # Angles grow to max_seq_len radians: in bfloat16 those past 256 would all be rounded.
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (K/2,)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)  # (T, K/2)
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of dimensions by its position's angle; computed in float32, returned in x's type.

    Shapes:
        x (B, H, T, K); cos and sin (T, K), or (B, 1, T, K) where rows differ; returns (B, H, T, K)
    """
    x32 = float32(x)
    others = x32.roll(x.shape[-1] // 2, dims=-1)  # each dimension's partner in its place
    y = torch.addcmul(x32 * cos, others, sin)
    return y if x is x32 else y.type_as(x)
