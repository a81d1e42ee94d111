"""Keys and values of the tokens already seen, so that generating the next one costs one token's work.

Rows of a batch may hold different numbers of tokens: each row's first token is in slot 0, so a token's slot is its
position, and a row's text never depends on how long its neighbours are.

A tensor a layer: of one for all of them, a compiled step would copy the whole for each layer that it changes.

Shapes: B batch, M rows of a fork, G key-value heads, T slots, K head dimension.
"""

import copy

import torch
from torch import Tensor

from myllm.config import ModelConfig


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
        shape = (batch, config.kv_heads, max_tokens, config.head_size)  # (B, G, T, K)

        def layers() -> list[Tensor]:
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]

        self.keys, self.values = layers(), layers()
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.static = static
        self.mask: Tensor | None = None
        self.start = self.end = 0
        if static:  # captured once, in place: CUDA graphs neither copy them nor fall back
            for part in (*self.keys, *self.values):
                torch._dynamo.mark_static_address(part, guard=False)

    @property
    def length(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.lengths.max())

    @property
    def max_tokens(self) -> int:
        return self.keys[0].shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def start_step(self, new: int) -> slice | Tensor:
        """Make ready for `new` tokens a row and say their positions: a slice where rows are equally long, else (B, 1).

        Rows of different lengths take one token at a time; then, and in a static cache's single steps, `mask`,
        (B, 1, 1, end), is true where a row has tokens.
        """
        lengths = self.lengths.tolist()
        self.start = max(lengths)
        self.end = self.start + new
        assert self.end <= self.max_tokens, f"cache of {self.max_tokens} tokens cannot hold {self.end}"
        static = self.static and new == 1
        if static:
            self.end = self.max_tokens
        elif min(lengths) == self.start:
            self.mask = None
            return slice(self.start, self.end)
        assert new == 1, "rows of different lengths take one token at a time"
        positions = self.lengths.to(self.device)[:, None]  # (B, 1)
        self._rows, self._slots = torch.arange(len(lengths), device=self.device), positions[:, 0]  # (B,) each
        self.mask = torch.arange(self.end, device=self.device) <= positions[:, None, None]  # (B, 1, 1, end)
        return positions

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values behind the old ones, where `open` said, and return all of them.

        `lengths` move only in `advance`, once every layer has written.

        Shapes:
            keys and values (B, G, new, K); returns (B, G, end, K) each
        """
        all_keys, all_values = self.keys[layer], self.values[layer]
        if self.mask is None:
            new = self.end - self.start
            all_keys.narrow(2, self.start, new).copy_(keys)
            all_values.narrow(2, self.start, new).copy_(values)
        else:
            all_keys[self._rows, :, self._slots] = keys[:, :, 0].type_as(all_keys)
            all_values[self._rows, :, self._slots] = values[:, :, 0].type_as(all_values)
        if self.end == self.max_tokens:
            return all_keys, all_values
        return all_keys.narrow(2, 0, self.end), all_values.narrow(2, 0, self.end)

    def advance(self, tokens: int) -> None:
        self.lengths += tokens

    def row(self, index: int) -> "KVCache":
        """One row as a cache of its own that shares this one's memory and length."""
        view = object.__new__(KVCache)
        view.keys = [part[index : index + 1] for part in self.keys]
        view.values = [part[index : index + 1] for part in self.values]
        view.lengths, view.static = self.lengths[index : index + 1], False
        return view

    def select_rows(self, rows: list[int]) -> None:
        """Drop all other rows. The cache is static no longer: another batch size would be compiled anew."""
        self.static = False
        self.keys, self.values = [part[rows] for part in self.keys], [part[rows] for part in self.values]
        self.lengths = self.lengths[rows]

    def clear(self) -> None:
        self.lengths.zero_()

    def expand(self, owners: Tensor, max_tokens: int) -> "KVCache":
        """A cache whose row m begins with what row `owners[m]` of this one holds.

        Shapes:
            owners (M,), each in [0, B); the new cache has M rows
        """
        forked = copy.copy(self)
        length = self.length

        def copied(part: Tensor) -> Tensor:
            new = part.new_zeros(len(owners), part.shape[1], max_tokens, part.shape[3])  # (M, G, T, K)
            new[:, :, :length] = part[owners, :, :length]
            return new

        forked.keys, forked.values = [copied(part) for part in self.keys], [copied(part) for part in self.values]
        forked.lengths = self.lengths[owners.cpu()]
        return forked


def cache_dtype(device: torch.device) -> torch.dtype:
    """What keys and values come in: autocast's type where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
