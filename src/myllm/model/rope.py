"""Rotary position embedding.

Source: Su et al. 2021 (RoFormer), equation 34, in the half-split layout of GPT-NeoX and Llama: dimension i is paired
with dimension i + K/2, not with its neighbor.

Shapes: B batch, H heads, T sequence, K head dimension.
"""

import torch
from torch import Tensor


def rotary_tables(max_seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and dimension, in float32.

    The sine of the first half is negative: rotation subtracts there.

    Shapes:
        returns (max_seq_len, head_dim) each
    """
    # Angles grow to max_seq_len radians; bfloat16 would round those above 256.
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (K/2,)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)  # (T, K/2)
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions by the angle of its position, in float32; returned in x's type.

    Shapes:
        x (B, H, T, K); cos and sin (T, K), or (B, 1, T, K) if rows differ in position; returns (B, H, T, K)
    """
    x32 = x.float()
    partners = x32.roll(x.shape[-1] // 2, dims=-1)  # (B, H, T, K), dimension i + K/2 in place of i
    return torch.addcmul(x32 * cos, partners, sin).type_as(x)
