"""Rotary position embedding.

Source: Su et al. 2021 (RoFormer), equation 34, in the half-split layout of GPT-NeoX and Llama: dimension i is paired
with dimension i + K/2, not with its neighbor.

Shapes: B batch, H heads, T sequence, K head dimension.
"""

import math

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> Tensor:
    """Angle by which each pair of dimensions turns from one position to the next, in float32.

    Source of the scaling: Llama 3.1 (meta-llama/llama-models, apply_scaling), rope_type "llama3" of transformers.

    Args:
        scaling: factor, low, high, context; empty: none. A pair that turns less than `low` times within `context`
            positions turns `factor` times slower, one that turns more than `high` times is kept, others are blended.

    Shapes:
        returns (head_dim / 2,)
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if not scaling:
        return frequencies
    factor, low, high, context = scaling
    turns = context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotary_tables(max_seq_len: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and dimension, in float32.

    The sine of the first half is negative: rotation subtracts there.

    Shapes:
        frequencies (K/2,); returns (max_seq_len, K) each
    """
    # Angles grow to max_seq_len radians; bfloat16 would round those above 256.
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
