"""Keys and values of the tokens already seen, so that generating the next one costs one token's work.

Rows of a batch may hold different numbers of tokens: each row's first token is in slot 0, so a token's slot is its
position, and a row's text never depends on how long its neighbours are.

Shapes: L layers, B batch, M rows of a fork, G key-value heads, T slots, K head dimension.
"""

import copy

import torch
from torch import Tensor

from ..config import ModelConfig


class KVCache:
    """Room for `max_tokens` tokens a row, allocated once; `lengths`, (B,) on the CPU, says how many are filled."""

    def __init__(
        self, config: ModelConfig, batch: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layers, batch, config.kv_heads, max_tokens, config.head_size)  # (L, B, G, T, K)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.slots: slice | tuple[Tensor, Tensor] = slice(0, 0)
        self.mask: Tensor | None = None
        self.end = 0

    @property
    def length(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.lengths.max())

    @property
    def max_tokens(self) -> int:
        return self.keys.shape[3]

    def open(self, new: int) -> slice | Tensor:
        """Make ready for `new` tokens a row and say their positions: a slice where rows are equally long, else (B, 1).

        Rows of different lengths take one token at a time; then `mask`, (B, 1, 1, end), is true where a row has tokens.
        """
        longest = self.length
        self.end = longest + new
        assert self.end <= self.max_tokens, f"cache of {self.max_tokens} tokens cannot hold {self.end}"
        if bool((self.lengths == longest).all()):
            self.slots, self.mask = slice(longest, self.end), None
            return self.slots
        assert new == 1, "rows of different lengths take one token at a time"
        positions = self.lengths.to(self.keys.device)  # (B,)
        self.slots = torch.arange(len(positions), device=positions.device), positions
        self.mask = torch.arange(self.end, device=positions.device) <= positions[:, None, None, None]
        return positions.unsqueeze(1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values behind the old ones, where `open` said, and return all of them.

        `lengths` move only in `advance`, once every layer has written.

        Shapes:
            keys and values (B, G, new, K); returns (B, G, end, K) each
        """
        if isinstance(self.slots, slice):
            self.keys[layer, :, :, self.slots] = keys
            self.values[layer, :, :, self.slots] = values
        else:
            rows, slots = self.slots  # (B,) each
            self.keys[layer][rows, :, slots] = keys.squeeze(2).to(self.keys.dtype)  # (B, G, K)
            self.values[layer][rows, :, slots] = values.squeeze(2).to(self.values.dtype)
        return self.keys[layer, :, :, : self.end], self.values[layer, :, :, : self.end]

    def advance(self, tokens: int) -> None:
        self.lengths += tokens

    def row(self, index: int) -> "KVCache":
        """One row as a cache of its own that shares this one's memory and length."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, index : index + 1], self.values[:, index : index + 1]
        view.lengths = self.lengths[index : index + 1]
        return view

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]

    def clear(self) -> None:
        self.lengths.zero_()

    def fork(self, owners: Tensor, max_tokens: int) -> "KVCache":
        """A cache whose row m begins with what row `owners[m]` of this one holds.

        Shapes:
            owners (M,), each in [0, B); the new cache has M rows
        """
        forked = copy.copy(self)
        shape = (self.keys.shape[0], len(owners), self.keys.shape[2], max_tokens, self.keys.shape[4])
        forked.keys, forked.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)  # (L, M, G, T, K)
        for mine, new in ((self.keys, forked.keys), (self.values, forked.values)):
            new[:, :, :, : self.length] = mine[:, owners, :, : self.length]
        forked.lengths = self.lengths[owners.cpu()]
        return forked


def cache_dtype(device: torch.device) -> torch.dtype:
    """What keys and values come in: autocast's type where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
