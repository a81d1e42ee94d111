"""Causal self-attention: multi-head or grouped-query, with optional rotary positions and QK-norm.

Shapes: B batch, T new tokens, S all tokens (cached tokens first), D d_model, H query heads, G key-value heads, K head
dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from myllm.config import ModelConfig

from .kv_cache import KVCache
from .norm import RMSNorm
from .rope import rotate


class Attention(nn.Module):
    """The attention of one layer. One matrix projects to queries, keys and values, in this order of rows."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_size
        self.qkv_proj = nn.Linear(config.d_model, (self.n_heads + 2 * self.kv_heads) * self.head_dim, bias=config.bias)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, config.d_model, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        p = config.dropout_attention_residual
        self.dropout = nn.Dropout(p) if p else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None) -> Tensor:
        """
        Shapes:
            x (B, T, D); rotary is cosine and sine, (T, K) or (B, 1, T, K) each; returns (B, T, D)
        """
        B, T, _ = x.shape
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2G, T, K)
        q, k, v = heads.split((self.n_heads, self.kv_heads, self.kv_heads), dim=1)  # (B, H|G|G, T, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, K)
        if cache is not None and cache.mask is not None:  # rows differ in length, or the cache is static
            mask: dict[str, Any] = {"attn_mask": cache.mask}
        else:
            mask = _causal_mask(T, k.shape[2], v)
        y = F.scaled_dot_product_attention(q, k, v, **mask, enable_gqa=self.n_heads != self.kv_heads)  # (B, H, T, K)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H K)
        return self.dropout(self.out_proj(y))  # (B, T, D)


def _causal_mask(T: int, S: int, values: Tensor) -> dict[str, Any]:
    """Arguments of SDPA for causal attention: its flag if nothing is cached, otherwise a mask, (T, S)."""
    # In half precision, MPS's own mask shows a token up to three later ones before torch 2.13 (pytorch/pytorch#195910).
    if T == S and (values.device.type != "mps" or values.dtype is torch.float32):
        return {"is_causal": True}
    if T == 1:
        return {}  # a single new token attends to everything
    mask = values.new_ones(T, S, dtype=torch.bool)
    return {"attn_mask": mask.tril(diagonal=S - T)}
