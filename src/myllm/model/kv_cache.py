"""Keys and values of earlier tokens, so that the next token costs the work of one token.

The slot of a token is its position: rows start in slot 0, whatever their lengths, so a row does not depend on the
lengths of the other rows. Keys and values are one tensor per layer: with one tensor for all layers, a compiled step
would copy the whole cache for each layer that it writes.

Shapes: B batch, M rows of an expanded cache, G key-value heads, S slots, K head dimension.
"""

import copy

import torch
from torch import Tensor

from myllm.config import ModelConfig


class KVCache:
    """Memory for `max_tokens` tokens a row, allocated once. `lengths`, (B,) on the CPU, counts the tokens of each row.

    With `static`, a step of one token has the same shapes at any length, so that it can be compiled once: it attends to
    all slots and masks the empty ones.
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
        shape = (batch, config.kv_heads, max_tokens, config.head_size)  # (B, G, S, K)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.static = static
        self.mask: Tensor | None = None
        self.start = self.end = 0
        if static:  # with fixed addresses, CUDA graphs update the tensors in place and do not copy them
            for tensor in (*self.keys, *self.values):
                torch._dynamo.mark_static_address(tensor, guard=False)

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths.max())

    @property
    def max_tokens(self) -> int:
        return self.keys[0].shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def start_step(self, new: int) -> slice | Tensor:
        """Prepare to append `new` tokens to each row and return their positions.

        Positions are a slice if all rows have the same length, otherwise (B, 1); rows of different lengths take one
        token at a time. In the second case, and in one-token steps of a static cache, `mask`, (B, 1, 1, end), is true
        where a row has tokens.
        """
        lengths = self.lengths.tolist()
        self.start = max(lengths)
        self.end = self.start + new
        assert self.end <= self.max_tokens, f"cache of {self.max_tokens} tokens cannot hold {self.end}"
        if self.static and new == 1:
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
        """Write the new keys and values of one layer at the positions from `start_step`; return those of all tokens.

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
        """Count the tokens of a step, after every layer has appended them."""
        self.lengths += tokens

    def row(self, index: int) -> "KVCache":
        """A cache of one row that shares this cache's memory and length."""
        view = copy.copy(self)
        view.keys = [keys[index : index + 1] for keys in self.keys]
        view.values = [values[index : index + 1] for values in self.values]
        view.lengths, view.static = self.lengths[index : index + 1], False
        return view

    def select_rows(self, rows: list[int]) -> None:
        """Drop all other rows. The cache is no longer static: each batch size would be compiled."""
        self.static = False
        self.keys, self.values = [keys[rows] for keys in self.keys], [values[rows] for values in self.values]
        self.lengths = self.lengths[rows]

    def clear(self) -> None:
        self.lengths.zero_()

    def expand(self, owners: Tensor, max_tokens: int) -> "KVCache":
        """A copy for `max_tokens` tokens whose row m starts with the tokens of row `owners[m]`.

        Shapes:
            owners (M,), each in [0, B); the new cache has M rows
        """

        def expanded(tensor: Tensor) -> Tensor:
            new = tensor.new_zeros(len(owners), tensor.shape[1], max_tokens, tensor.shape[3])  # (M, G, S, K)
            new[:, :, : self.length] = tensor[owners, :, : self.length]
            return new

        cache = copy.copy(self)
        cache.keys, cache.values = [expanded(keys) for keys in self.keys], [expanded(values) for values in self.values]
        cache.lengths = self.lengths[owners.cpu()]
        return cache
