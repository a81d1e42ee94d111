"""Keys and values of the tokens already seen, so that generating the next one costs one token's work.

Shapes: L layers, B batch, G key-value heads, T tokens, K head dimension.
"""

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
