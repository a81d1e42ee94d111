"""Token ids from token ids, with a key-value cache: one engine for evaluations, the command line and notebooks.

Shapes: B rows under way, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from myllm.distributed.device_info import has_triton
from myllm.errors import UserError
from myllm.model.kv_cache import KVCache, cache_dtype
from myllm.model.transformer import Transformer

from .bare import bare
from .sampling import Likelihood, choose, likelihoods
from .sampling_params import Sampling

COMPILED_FROM = 512
"""New tokens from which on CUDA compiles the steps: it takes a while, and pays only for a long text."""

Finish = Literal["end_of_text", "length", "stop"]


@dataclass
class Continuation:
    """One sample under way. Setting `finish` from outside ends it."""

    prompt: list[int]
    seed: int
    written: list[int] = field(default_factory=list)
    finish: Finish | None = None
    likelihood: Likelihood | None = None
    """Of the newest token, the end of the text included; only if `continue_batch` was asked for it."""


def stream(
    model: Transformer, prompt: list[int], max_new_tokens: int, sampling: Sampling, end_of_text: int | None = None
) -> Iterator[int]:
    """Continue one prompt, a token id at a time. As `continue_batch` with one row.

    Raises:
        UserError: empty prompt or settings out of range, at the call.
    """
    one = [Continuation(prompt, sampling.seed)]
    rows = continue_batch(model, one, max_new_tokens, sampling, end_of_text)
    return (row.written[-1] for row in rows)


def continue_batch(
    model: Transformer,
    batch: Sequence[Continuation],
    max_new_tokens: int,
    sampling: Sampling,
    end_of_text: int | None = None,
    likeliest: int = 0,
) -> Iterator[Continuation]:
    """Continue prompts of any lengths together, until `end_of_text` (which is not written) or `max_new_tokens`.

    Gives out a row each time it has a new token, rows in turn. A row's text depends on its prompt and its own seed,
    not on its neighbours, up to rounding; training's random state is left alone. Beyond the context a row's window
    slides: the older half is forgotten, the newer half read again. Of a prompt longer than the context, the last
    tokens count.

    Args:
        model: in evaluation mode.
        sampling: for all rows, but for its seed: each row has its own.
        likeliest: above 0, set each row's `likelihood` at each token, with this many likeliest ones.

    Raises:
        UserError: an empty prompt or settings out of range, at the call and not at the first token.
    """
    if not all(row.prompt for row in batch):
        raise UserError("the prompt is empty: give at least one token to start from")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens} must not be negative")
    sampling.check()
    return _continue(model, list(batch), max_new_tokens, sampling, end_of_text, likeliest)


@torch.inference_mode()
def _continue(
    model: Transformer,
    rows: list[Continuation],
    max_new_tokens: int,
    sampling: Sampling,
    end_of_text: int | None,
    likeliest: int,
) -> Iterator[Continuation]:
    device, context = next(model.parameters()).device, model.config.max_seq_len
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    if max_new_tokens == 0:
        for row in rows:
            row.finish = "length"
    if not rows or max_new_tokens == 0:
        return
    windows = [row.prompt[-context:] for row in rows]
    static = max_new_tokens >= COMPILED_FROM and has_triton(device)
    if static:
        model.compile_decoding(mode="reduce-overhead")
        windows += [[0]] * (slots_for(len(rows)) - len(rows))  # what fills up the batch is one token that nobody sees
    room = context if static else min(context, max(map(len, windows)) + max_new_tokens)
    with model.autocast():
        cache = KVCache(model.config, len(windows), room, device, cache_dtype(device), static)
    step = model if static else bare(model)
    logits = read(model, windows, cache)[: len(rows)]
    while True:
        seen = [row.prompt + row.written for row in rows] if sampling.repetition_penalty != 1 else [[]] * len(rows)
        tokens = choose(logits, sampling, generators, seen)
        if likeliest:
            for row, likelihood in zip(rows, likelihoods(logits, tokens, likeliest), strict=True):
                row.likelihood = likelihood
        for row, token in zip(rows, tokens, strict=True):
            if token == end_of_text:
                row.finish = "end_of_text"
                continue
            row.written.append(token)
            if len(row.written) == max_new_tokens:
                row.finish = "length"
            yield row
        kept = [index for index, row in enumerate(rows) if row.finish is None]
        if not kept:
            return
        if len(kept) < len(rows):
            rows, generators = [rows[index] for index in kept], [generators[index] for index in kept]
            cache.select_rows(kept)
        logits = _next(step, rows, cache, context)


def slots_for(rows: int) -> int:
    """Rows of the cache of a compiled step: the next power of two, so that few sizes of a batch are compiled."""
    return 1 << (rows - 1).bit_length()


def read(model: Transformer, windows: list[list[int]], cache: KVCache) -> Tensor:
    """Fill an empty cache with rows of any lengths and return the logits of what comes next.

    Shapes:
        returns (B, V)
    """
    counts = [len(window) for window in windows]
    # Shorter rows are filled up on the right with any token: nothing looks at it.
    padded = [window + [0] * (max(counts) - len(window)) for window in windows]
    return model.next_logits(torch.tensor(padded, device=cache.device), cache, counts)


def _next(model: Transformer, rows: list[Continuation], cache: KVCache, context: int) -> Tensor:
    """The logits after each row's newest token, (B, V)."""
    full = [index for index in range(len(rows)) if cache.lengths[index] == context] if cache.length == context else []
    for index in full:
        window = cache.row(index)
        window.clear()
        tokens = (rows[index].prompt + rows[index].written)[-(context // 2 or 1) :]
        if tokens[:-1]:
            model.hidden(torch.tensor([tokens[:-1]], device=cache.device), window)
    spare = len(cache.lengths) - len(rows)  # of a static cache: see slots_for
    cache.lengths[len(rows) :] = 0
    newest = torch.tensor([[row.written[-1]] for row in rows] + [[0]] * spare, device=cache.device)
    return model.next_logits(newest, cache)[: len(rows)]
