"""The Transformer: pre-norm blocks between an embedding and a head, its parts chosen by ModelConfig.

Shapes: B batch, T sequence, D d_model, V padded vocabulary, K head dimension; M continuations, P tokens before them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from myllm.config import ModelConfig

from . import attention_backend as sdpa
from .attention import Attention
from .cross_entropy import linear_cross_entropy, token_log_probs, token_ranks
from .feed_forward import FeedForward
from .huge_pages import use_huge_pages
from .init_weights import initialize
from .kv_cache import KVCache, cache_dtype
from .linear import linear, logits
from .norm import make_norm
from .rope import rotary_tables


def _in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that evaluations and generation call, with products in what `Transformer.set_compute_dtype` said."""

    @wraps(method)
    def computed(model: "Transformer", *arguments: Any, **settings: Any) -> Any:
        with model.autocast():
            return method(model, *arguments, **settings)

    return computed


class Transformer(nn.Module):
    """A decoder-only language model with fresh weights.

    Args:
        config: its shape and parts.
        seed: of the starting weights.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.quantized = False
        self.compute_dtype: torch.dtype | None = None
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout_embedding) if config.dropout_embedding else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        # A tied head is no module of its own: the embedding's weight is saved and updated once.
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        else:
            cos, sin = rotary_tables(config.max_seq_len, config.head_size, config.rope_theta)
            self.register_buffer("rotary_cos", cos, persistent=False)  # (T, K)
            self.register_buffer("rotary_sin", sin, persistent=False)  # (T, K)
        self._step: Callable[..., Tensor] | None = None
        self._training_loss: Callable[[Tensor, Tensor, Tensor, int], Tensor] = linear_cross_entropy
        initialize(self, config, seed)
        use_huge_pages(self)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Mean loss in nats if targets are given, logits if not.

        With a cache, `tokens` continue what it holds, and it holds them too afterwards.

        Shapes:
            tokens and targets (B, T); returns a scalar, or logits (B, T, vocab_size)
        """
        hidden = self.hidden(tokens, cache)  # (B, T, D)
        if targets is not None:
            loss = self._training_loss if self.training and torch.is_grad_enabled() else linear_cross_entropy
            return loss(hidden.flatten(0, 1), self.head_weight, targets.flatten(), self.config.vocab_size)
        return self._logits(hidden)

    @_in_own_precision
    def next_logits(self, tokens: Tensor, cache: KVCache, counts: list[int] | None = None) -> Tensor:
        """Logits of the token after each row's last; the head runs there alone.

        Of few rows they may lie in memory column by column.

        Args:
            counts: tokens that each row really has, where shorter rows are filled up on the right. The cache then
                holds only these. None: all of them.

        Shapes:
            tokens (B, T); returns (B, vocab_size)
        """
        hidden = self.hidden(tokens, cache)  # (B, T, D)
        if counts is None:
            return self._logits(hidden[:, -1], logits)
        # What fills up a row comes after its tokens: none of them sees it, and later tokens overwrite it.
        kept = torch.tensor(counts)
        cache.lengths += kept - tokens.shape[1]
        last = (kept - 1).to(tokens.device)
        return self._logits(hidden[torch.arange(len(counts), device=tokens.device), last], logits)

    @torch.no_grad()
    @_in_own_precision
    def score(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and whether it was the likeliest token. Targets of -1 are not asked.

        Shapes:
            tokens and targets (B, T); returns (B, T) float32 and (B, T) bool
        """
        hidden = self.hidden(tokens).flatten(0, 1)  # (B T, D)
        log_probs, correct = token_log_probs(hidden, self.head_weight, targets.flatten(), self.config.vocab_size)
        return log_probs.view_as(targets), correct.view_as(targets)

    @torch.no_grad()
    @_in_own_precision
    def score_continuations(
        self, prefixes: Tensor, owners: Tensor, tokens: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `score`, where row m of `tokens` goes on from prefix `owners[m]`; each prefix is computed once.

        Rows that are shorter are padded on the right, where nothing looks.

        Shapes:
            prefixes (B, P), P may be 0; owners (M,); tokens and targets (M, T); returns (M, T) float32 and (M, T) bool
        """
        B, P = prefixes.shape
        cache = KVCache(self.config, B, P, tokens.device, cache_dtype(tokens.device))
        if P:
            self.hidden(prefixes, cache)
        hidden = self.hidden(tokens, cache.expand(owners, P + tokens.shape[1])).flatten(0, 1)  # (M T, D)
        log_probs, correct = token_log_probs(hidden, self.head_weight, targets.flatten(), self.config.vocab_size)
        return log_probs.view_as(targets), correct.view_as(targets)

    @torch.no_grad()
    @_in_own_precision
    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each target, how many tokens were likelier, and the likeliest one's probability.

        Shapes:
            tokens and targets (B, T), targets of -1 are not asked; returns (B, T) float32, int64 and float32
        """
        hidden = self.hidden(tokens).flatten(0, 1)  # (B T, D)
        parts = token_ranks(hidden, self.head_weight, targets.flatten(), self.config.vocab_size)
        log_probs, places, confidence = (part.view_as(targets) for part in parts)
        return log_probs, places, confidence

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The last layer's normalized output.

        Shapes:
            tokens (B, T); returns (B, T, D)
        """
        new = tokens.shape[1]
        positions = cache.start_step(new) if cache is not None else slice(0, new)  # or (B, 1): see KVCache.start_step
        end = cache.end if cache is not None else new
        assert end <= self.config.max_seq_len, f"{end} tokens exceed the context of {self.config.max_seq_len}"
        compiled = self._step is not None and cache is not None and cache.static and new == 1
        if self.training:  # who trains says by which kernels
            x = self._run(tokens, positions, cache)
        else:
            with sdpa.inference_backends(tokens.device), self.autocast():
                x = self._step_compiled(tokens, positions, cache) if compiled else self._run(tokens, positions, cache)
        if cache is not None:
            cache.advance(new)
        return x

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Multiply in `dtype` in evaluations and generation, as training's autocast does, to the bit.

        The blocks' matrices are kept in it, so that no step has to round them; the rest stays float32. Not for
        training.
        """
        self.compute_dtype = None if dtype is torch.float32 else dtype
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast to the type of `set_compute_dtype`; nothing where there is none, or whoever calls has said one."""
        device = self._stored_head.device.type
        if self.compute_dtype is None or torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, self.compute_dtype)

    def compile_decoding(self, **options: Any) -> None:
        """Compile single tokens behind a static cache, at the first of them; done once.

        Args:
            options: of `torch.compile`.
        """
        if self._step is None:
            self._step = torch.compile(self._run, fullgraph=True, dynamic=False, **options)

    def _step_compiled(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """As `_run`; for the cache's other steps too, once torch has compiled as many kinds of steps as it does of one
        function, which it says by an error before anything is computed."""
        try:
            return self._step(tokens, positions, cache)
        except Exception as error:
            if type(error).__name__ != "FailOnRecompileLimitHit":  # of torch._dynamo.exc, which is slow to import
                raise
            cache.static = False
            return self._run(tokens, positions, cache)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block and the loss on their own, for training; blocks of one shape share one graph.

        Evaluations go through the same blocks uncompiled: their shapes would each be compiled anew.

        Args:
            options: of `torch.compile`.
        """
        self._training_loss = torch.compile(linear_cross_entropy, **options)
        for block in self.blocks:
            block.compiled = torch.compile(block.run, **options)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Training that runs operation by operation, so that hooks see each."""
        loss, compiled = self._training_loss, [block.compiled for block in self.blocks]
        try:
            self._training_loss = linear_cross_entropy
            for block in self.blocks:
                block.compiled = None
            yield
        finally:
            self._training_loss = loss
            for block, one in zip(self.blocks, compiled, strict=True):
                block.compiled = one

    def _run(self, tokens: Tensor, positions: slice | Tensor, cache: KVCache | None) -> Tensor:
        """From tokens to the normalized output, where the cache is open."""
        x = self.embedding(tokens)  # (B, T, D)
        rotary = None
        if self.config.position == "learned":
            x = x + self.positions.weight[positions]  # (T, D) over the batch, or (B, T, D)
        else:
            rotary = self.rotary_cos[positions], self.rotary_sin[positions]  # (T, K) each
            if not isinstance(positions, slice):
                rotary = rotary[0].unsqueeze(1), rotary[1].unsqueeze(1)  # (B, 1, T, K) each
        if self.training and self.config.residual_dtype == "bfloat16" and _autocasts_to_bfloat16(x.device):
            x = x.bfloat16()  # and stays so: autocast has what blocks add in bfloat16
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotary, cache)
        return self.norm(x)

    def _logits(self, hidden: Tensor, product: Callable[[Tensor, Tensor], Tensor] = linear) -> Tensor:
        if self.quantized:  # such a matrix cannot be cut in inference mode
            return nn.functional.linear(hidden, self._stored_head)[..., : self.config.vocab_size]
        return product(hidden, self._stored_head[: self.config.vocab_size])

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D); floats made for the occasion where it is quantised."""
        return self._stored_head.dequantize() if self.quantized else self._stored_head

    @property
    def _stored_head(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight


def _autocasts_to_bfloat16(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) is torch.bfloat16


class Block(nn.Module):
    """Attention, then feed-forward, each normalized before and added back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.recompute = False
        """Whether the backward pass computes what is inside again instead of keeping it."""
        self.compiled: Callable[..., Tensor] | None = None
        """What training calls in place of the block's own operations, wrappers' hooks aside."""

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None) -> Tensor:
        """
        Shapes:
            x (B, T, D); returns (B, T, D)
        """
        if self.compiled is not None and self.training and cache is None and torch.is_grad_enabled():
            return self.compiled(x, rotary)
        return self.run(x, rotary, cache)

    def run(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None) -> Tensor:
        """As `forward`, never by way of `compiled`."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, rotary, cache, use_reentrant=False)
        return self._run(x, rotary, cache)

    def _run(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))
