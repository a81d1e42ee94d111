"""The Transformer: pre-norm blocks between an embedding and a head. ModelConfig chooses the parts.

Shapes: B batch, T sequence, D d_model, V padded vocabulary, K head dimension.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from myllm.config import ModelConfig

from .attention import Attention
from .attention_backend import inference_backends
from .cross_entropy import linear_cross_entropy, token_log_probs, token_ranks
from .feed_forward import FeedForward
from .init_weights import initialize
from .kv_cache import KVCache
from .norm import make_norm
from .rope import rotary_frequencies, rotary_tables

Rotary = tuple[Tensor, Tensor] | None  # cosine and sine, (T, K) or (B, 1, T, K) each


class Block(nn.Module):
    """Attention, then feed-forward. Each reads a normalized input and adds its output to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.recompute = False
        """If true, the backward pass recomputes the activations inside the block instead of keeping them."""
        self.compiled: Callable[..., Tensor] | None = None
        """Compiled form of `run`, for training only: the shapes of evaluations vary, and each would be compiled."""

    def forward(self, x: Tensor, rotary: Rotary, scale: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """
        Shapes:
            x (B, T, D); scale, a scalar that divides what the block adds; returns (B, T, D)
        """
        if self.compiled is not None and self.training and cache is None and torch.is_grad_enabled():
            return self.compiled(x, rotary, scale)
        return self.run(x, rotary, scale, cache)

    def run(self, x: Tensor, rotary: Rotary, scale: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """`forward` as plain operations, which `compile_blocks` compiles."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._add_sublayers, x, rotary, scale, cache, use_reentrant=False)
        return self._add_sublayers(x, rotary, scale, cache)

    def _add_sublayers(self, x: Tensor, rotary: Rotary, scale: Tensor | None, cache: KVCache | None) -> Tensor:
        added = self.attention(self.attention_norm(x), rotary, cache)  # (B, T, D)
        x = x + (added if scale is None else added / scale)  # (B, T, D)
        added = self.feed_forward(self.feed_forward_norm(x))  # (B, T, D)
        return x + (added if scale is None else added / scale)  # (B, T, D)


class Transformer(nn.Module):
    """A decoder-only language model, initialized from `seed`."""

    rotary_cos: Tensor
    rotary_sin: Tensor
    residual_scales: nn.Parameter | None
    """(n_layers,). Norms ignore the size of the stream, so instead of multiplying it by a scale before each block, what
    the block adds is divided by the product of the scales so far, which exports can fold into its projections."""
    token_losses: Tensor | None
    """Of each target of the last batch, (B T,) float32; only if `keep_token_losses` was set before the first one."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.quantized = False
        self.compute_dtype: torch.dtype | None = None
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout_embedding) if config.dropout_embedding else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.residual_scales = nn.Parameter(torch.ones(config.n_layers)) if config.residual_scales else None
        self.norm = make_norm(config)
        # A tied head is not a module: the embedding's weight must be saved and updated once.
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        else:
            frequencies = rotary_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
            cos, sin = rotary_tables(config.max_seq_len, frequencies)
            self.register_buffer("rotary_cos", cos, persistent=False)  # (max_seq_len, K)
            self.register_buffer("rotary_sin", sin, persistent=False)  # (max_seq_len, K)
        self._training_loss: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] = linear_cross_entropy
        self.token_losses = None
        self.keep_token_losses = False
        self._compiled_decode: Callable[..., Tensor] | None = None
        initialize(self, config, seed)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The mean loss in nats if targets are given, otherwise logits.

        With a cache, `tokens` continue the cached tokens and are added to the cache.

        Shapes:
            tokens and targets (B, T); returns a scalar, or logits (B, T, vocab_size)
        """
        hidden = self.hidden(tokens, cache)  # (B, T, D)
        if targets is None:
            return self.logits(hidden)
        loss = self._training_loss if self.training and torch.is_grad_enabled() else linear_cross_entropy
        mean, losses = loss(hidden.flatten(0, 1), self.head_weight, targets.flatten(), self.config.vocab_size)
        if self.keep_token_losses:
            self.token_losses = losses
        return mean

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalized output of the last block.

        Shapes:
            tokens (B, T); returns (B, T, D)
        """
        T = tokens.shape[1]
        positions: slice | Tensor = slice(0, T)
        end = T
        if cache is not None:
            positions, end = cache.start_step(T), cache.end
        assert end <= self.config.max_seq_len, f"{end} tokens exceed the context of {self.config.max_seq_len}"
        if self.training:  # the training step selects the attention kernels
            x = self._run_blocks(tokens, positions, cache)
        else:
            decode = self._compiled_decode if cache is not None and cache.static and T == 1 else None
            with inference_backends(tokens.device), self.autocast():
                x = (decode or self._run_blocks)(tokens, positions, cache)
        if cache is not None:
            cache.advance(T)
        return x

    def _run_blocks(self, tokens: Tensor, positions: slice | Tensor, cache: KVCache | None) -> Tensor:
        """`hidden` of tokens at these positions; `compile_decoding` compiles it.

        Shapes:
            tokens (B, T); positions a slice of T, or (B, T) if rows differ in position; returns (B, T, D)
        """
        x = self.embedding_norm(self.embedding(tokens))  # (B, T, D)
        rotary = None
        if self.config.position == "learned":
            x = x + self.positions.weight[positions]  # (T, D), or (B, T, D) if rows differ in position
        else:
            rotary = self.rotary_cos[positions], self.rotary_sin[positions]  # (T, K) each
            if not isinstance(positions, slice):
                rotary = rotary[0].unsqueeze(1), rotary[1].unsqueeze(1)  # (B, 1, T, K) each
        if self.training and self.config.residual_dtype == "bfloat16" and _autocast_dtype(x.device) is torch.bfloat16:
            x = x.bfloat16()  # and stays so: under autocast, blocks add bfloat16 to it
        x = self.dropout(x)
        scales = self.residual_scales
        # Not cumprod, whose backward pass waits for the GPU.
        products = [None] * len(self.blocks) if scales is None else accumulate(scales.unbind(), torch.mul)
        for block, product in zip(self.blocks, products, strict=True):
            x = block(x, rotary, product, cache)  # (B, T, D)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """
        Shapes:
            hidden (..., D); returns (..., vocab_size)
        """
        if self.quantized:  # a torchao weight cannot be sliced in inference mode
            return F.linear(hidden, self._head_weight)[..., : self.config.vocab_size]
        return F.linear(hidden, self._head_weight[: self.config.vocab_size])

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D), in floating point."""
        return self._head_weight.dequantize() if self.quantized else self._head_weight

    @property
    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden_matrices(self) -> dict[str, tuple[int, ...]]:
        """The weights of the blocks' linear layers, by parameter name: the rows of the matrices that each consists of.

        Queries, keys and values share a parameter, and so do SwiGLU's gate and up projections.
        """
        rows: dict[str, tuple[int, ...]] = {}
        for name, module in self.blocks.named_modules(prefix="blocks"):
            if isinstance(module, Attention):
                q, kv = module.n_heads * module.head_dim, module.kv_heads * module.head_dim
                rows |= {f"{name}.qkv_proj.weight": (q, kv, kv), f"{name}.out_proj.weight": (self.config.d_model,)}
            elif isinstance(module, FeedForward):
                n_up = 2 if module.activation == "swiglu" else 1
                rows[f"{name}.up_proj.weight"] = (self.config.d_ff,) * n_up
                rows[f"{name}.down_proj.weight"] = (self.config.d_model,)
        return rows

    # -- generation and evaluation ------------------------------------------------------------------------------------

    def make_cache(self, batch: int, max_tokens: int, static: bool = False) -> KVCache:
        """An empty cache on the model's device, in the type that attention computes in."""
        device = self._head_weight.device
        dtype = _autocast_dtype(device) or self.compute_dtype or torch.float32
        return KVCache(self.config, batch, max_tokens, device, dtype, static)

    def next_logits(self, tokens: Tensor, cache: KVCache, lengths: list[int] | None = None) -> Tensor:
        """Logits of the token that follows each row. The head is applied to each row's last token only.

        Args:
            lengths: number of tokens in each row, if rows are padded on the right. Only these stay in the cache.

        Shapes:
            tokens (B, T); returns (B, vocab_size)
        """
        hidden = self.hidden(tokens, cache)  # (B, T, D)
        if lengths is None:
            last = hidden[:, -1]  # (B, D)
        else:
            # No token attends to the padding, which comes after it, and later tokens overwrite it in the cache.
            kept = torch.tensor(lengths)  # (B,)
            cache.lengths += kept - tokens.shape[1]
            last = hidden[torch.arange(len(lengths), device=tokens.device), (kept - 1).to(tokens.device)]  # (B, D)
        with self.autocast():
            return self.logits(last)

    @torch.no_grad()
    def score_continuations(self, prefixes: Tensor, owners: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of each target, where row m of `tokens` continues prefix `owners[m]`.

        Each prefix is computed once. Shorter rows are padded on the right, with targets equal to IGNORE_INDEX, which
        get 0.

        Shapes:
            prefixes (B, P), P may be 0; owners (M,); tokens and targets (M, T); returns (M, T) float32
        """
        B, P = prefixes.shape
        cache = self.make_cache(B, P)
        if P:
            self.hidden(prefixes, cache)
        hidden = self.hidden(tokens, cache.expand(owners, P + tokens.shape[1]))  # (M, T, D)
        return self._per_target(token_log_probs, hidden, targets)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability and rank of each target (0 is the most likely token), and the highest probability.

        Shapes:
            tokens and targets (B, T); returns (B, T) float32, int64 and float32, 0 where ignored
        """
        return self._per_target(token_ranks, self.hidden(tokens), targets)

    def _per_target(self, function: Callable[..., Any], hidden: Tensor, targets: Tensor) -> Any:
        """Apply a function of cross_entropy.py; (N,) results become (B, T)."""
        with self.autocast():
            result = function(hidden.flatten(0, 1), self.head_weight, targets.flatten(), self.config.vocab_size)
        return result.view_as(targets) if isinstance(result, Tensor) else tuple(x.view_as(targets) for x in result)

    # -- precision and compilation ------------------------------------------------------------------------------------

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Multiply matrices in `dtype` in evaluation and generation, with the same bits as training's autocast.

        The blocks' matrices are stored in `dtype`, so that no step converts them. The rest stays float32. Not for
        training.
        """
        self.compute_dtype = None if dtype is torch.float32 else dtype
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast to the dtype of `set_compute_dtype`, unless there is none or the caller has its own autocast."""
        device = self._head_weight.device
        if self.compute_dtype is None or _autocast_dtype(device) is not None:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype)

    def compile_blocks(self, **options: Any) -> None:
        """Compile the loss and each block separately for training, with options of `torch.compile`.

        Blocks of the same shape share one graph.
        """
        self._training_loss = torch.compile(linear_cross_entropy, **options)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = torch.compile(block.run, **options)

    def compile_decoding(self, **options: Any) -> None:
        """Compile steps of one token with a static cache, with options of `torch.compile`, at the first call."""
        if self._compiled_decode is None:
            self._compiled_decode = torch.compile(self._run_blocks, fullgraph=True, dynamic=False, **options)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
