"""Rotary position embedding.

Source: Su et al. 2021 (RoFormer), equation 34, in the half-split layout of GPT-NeoX and Llama: dimension i is paired
with i + K/2, not with its neighbour.

Shapes: B batch, H heads, T sequence, K head dimension.
"""

import torch
from torch import Tensor


def rotary_tables(max_seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, in float32.

    Shapes:
        each (max_seq_len, head_dim / 2)
    """
    # Angles grow to max_seq_len radians: in bfloat16 those past 256 would all be rounded.
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (K/2,)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)  # (T, K/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of dimensions by its position's angle; computed in float32, returned in x's type.

    Shapes:
        x (B, H, T, K); cos and sin (T, K/2), or (B, 1, T, K/2) where rows differ; returns (B, H, T, K)
    """
    first, second = x.float().chunk(2, dim=-1)  # (B, H, T, K/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
