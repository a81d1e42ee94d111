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
    """Room for `max_tokens` tokens a row, allocated once; `lengths`, (B,) on the CPU, says how many are filled.

    With `static`, a step of one token has the same shapes however much is filled: it attends to all slots and masks
    those without a token, so that it can be compiled once.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        device: torch.device | str,
        dtype: torch.dtype,
        static: bool = False,
    ) -> None:
        shape = (config.n_layers, batch, config.kv_heads, max_tokens, config.head_size)  # (L, B, G, T, K)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.static = static
        self.mask: Tensor | None = None
        self.end = 0
        if static:  # captured once, in place: CUDA graphs neither copy it nor fall back
            for part in (self.keys, self.values):
                torch._dynamo.mark_static_address(part, guard=False)

    @property
    def length(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.lengths.max())

    @property
    def max_tokens(self) -> int:
        return self.keys.shape[3]

    def open(self, new: int) -> slice | Tensor:
        """Make ready for `new` tokens a row and say their positions: a slice where rows are equally long, else (B, 1).

        Rows of different lengths take one token at a time; then, and in a static cache's single steps, `mask`,
        (B, 1, 1, end), is true where a row has tokens.
        """
        lengths = self.lengths.tolist()
        longest = max(lengths)
        self.end = longest + new
        assert self.end <= self.max_tokens, f"cache of {self.max_tokens} tokens cannot hold {self.end}"
        static = self.static and new == 1
        if static:
            self.end, self._all_keys, self._all_values = self.max_tokens, self.keys, self.values
        else:  # cut once and not in each layer, where it would take a small model as long as attention
            self._all_keys, self._all_values = self.keys[:, :, :, : self.end], self.values[:, :, :, : self.end]
        if min(lengths) == longest and not static:
            self._new_keys, self._new_values = self._all_keys[:, :, :, longest:], self._all_values[:, :, :, longest:]
            self.mask = None
            return slice(longest, self.end)
        assert new == 1, "rows of different lengths take one token at a time"
        positions = self.lengths.to(self.keys.device)[:, None]  # (B, 1)
        self._slot = positions[:, :, None, None].expand(-1, self.keys.shape[2], 1, self.keys.shape[4])  # (B, G, 1, K)
        self.mask = torch.arange(self.end, device=positions.device) <= positions[:, None, None]  # (B, 1, 1, end)
        return positions

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values behind the old ones, where `open` said, and return all of them.

        `lengths` move only in `advance`, once every layer has written.

        Shapes:
            keys and values (B, G, new, K); returns (B, G, end, K) each
        """
        all_keys, all_values = self._all_keys[layer], self._all_values[layer]
        if self.mask is None:
            self._new_keys[layer] = keys
            self._new_values[layer] = values
        else:
            all_keys.scatter_(2, self._slot, keys.type_as(all_keys))
            all_values.scatter_(2, self._slot, values.type_as(all_values))
        return all_keys, all_values

    def advance(self, tokens: int) -> None:
        self.lengths += tokens

    def row(self, index: int) -> "KVCache":
        """One row as a cache of its own that shares this one's memory and length."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, index : index + 1], self.values[:, index : index + 1]
        view.lengths, view.static = self.lengths[index : index + 1], False
        return view

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows. The cache is static no longer: another batch size would be compiled anew."""
        self.static = False
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
