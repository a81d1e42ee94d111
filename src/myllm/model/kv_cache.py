"""Keys and values of the tokens already seen, so that generating the next one costs one token's work.

Shapes: L layers, B batch, M rows, G key-value heads, T tokens, K head dimension.
"""

import copy

import torch
from torch import Tensor

from ..config import ModelConfig


class KVCache:
    """Room for `max_tokens` tokens, allocated once; `length` of them are filled."""

    def __init__(
        self, config: ModelConfig, batch: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layers, batch, config.kv_heads, max_tokens, config.head_size)  # (L, B, G, T, K)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values behind the old ones and return all of them.

        `length` moves only in `advance`, once every layer has written.

        Shapes:
            keys and values (B, G, new, K); returns (B, G, length + new, K) each
        """
        end = self.length + keys.shape[2]
        assert end <= self.max_tokens, f"cache of {self.max_tokens} tokens cannot hold {end}"
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def clear(self) -> None:
        self.length = 0

    def fork(self, owners: Tensor, max_tokens: int) -> "KVCache":
        """A cache whose row m begins with what row `owners[m]` of this one holds.

        Shapes:
            owners (M,), each in [0, B); the new cache has M rows
        """
        forked = copy.copy(self)
        shape = (self.keys.shape[0], len(owners), self.keys.shape[2], max_tokens, self.keys.shape[4])
        forked.keys, forked.values = self.keys.new_empty(shape), self.values.new_empty(shape)  # (L, M, G, T, K)
        for mine, new in ((self.keys, forked.keys), (self.values, forked.values)):
            new[:, :, :, : self.length] = mine[:, owners, :, : self.length]
        return forked


def cache_dtype(device: torch.device) -> torch.dtype:
    """What keys and values come in: autocast's type where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
