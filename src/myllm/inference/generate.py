"""Token ids from token ids, with a key-value cache: one engine for evaluations, the command line and notebooks.

Shapes: B rows under way, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from myllm.distributed.device_info import has_triton
from myllm.errors import UserError
from myllm.model.kv_cache import KVCache, cache_dtype
from myllm.model.transformer import Transformer

from .cpu_decode import as_plain_objects
from .sampling import TokenLogprobs, choose, token_logprobs
from .sampling_params import SamplingParams

COMPILE_MIN_TOKENS = 512
"""New tokens from which on CUDA compiles the steps: it takes a while, and pays only for a long text."""

FinishReason = Literal["end_of_text", "length", "stop"]


@dataclass
class Sequence:
    """One sample under way. Setting `finish_reason` from outside ends it."""

    prompt: list[int]
    seed: int
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    """Of the newest token, the end of the text included; only with `top_logprobs`."""


def stream_tokens(
    model: Transformer, prompt: list[int], max_new_tokens: int, sampling: SamplingParams, end_of_text: int | None = None
) -> Iterator[int]:
    """Continue one prompt, a token id at a time. As `continue_batch` with one row.

    Raises:
        UserError: empty prompt or settings out of range, at the call.
    """
    one = [Sequence(prompt, sampling.seed)]
    rows = generate_batch(model, one, max_new_tokens, sampling, end_of_text)
    return (row.generated[-1] for row in rows)


def generate_batch(
    model: Transformer,
    batch: list[Sequence],
    max_new_tokens: int,
    sampling: SamplingParams,
    end_of_text: int | None = None,
    top_logprobs: int = 0,
) -> Iterator[Sequence]:
    """Continue prompts of any lengths together, until `end_of_text` (which is not written) or `max_new_tokens`.

    Gives out a row each time it has a new token, rows in turn. A row's text depends on its prompt and its own seed,
    not on its neighbours, up to rounding; training's random state is left alone. Beyond the context a row's window
    slides: the older half is forgotten, the newer half read again. Of a prompt longer than the context, the last
    tokens count.

    Args:
        model: in evaluation mode.
        sampling: for all rows, but for its seed: each row has its own.
        top_logprobs: if above 0, set `logprobs` of each row at each token, with this many most likely tokens.

    Raises:
        UserError: an empty prompt or settings out of range, at the call and not at the first token.
    """
    if not all(row.prompt for row in batch):
        raise UserError("the prompt is empty: give at least one token to start from")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens} must not be negative")
    sampling.check()
    return _continue(model, list(batch), max_new_tokens, sampling, end_of_text, top_logprobs)


@torch.inference_mode()
def _continue(
    model: Transformer,
    rows: list[Sequence],
    max_new_tokens: int,
    sampling: SamplingParams,
    end_of_text: int | None,
    top_logprobs: int,
) -> Iterator[Sequence]:
    device, context = next(model.parameters()).device, model.config.max_seq_len
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    if max_new_tokens == 0:
        for row in rows:
            row.finish_reason = "length"
    if not rows or max_new_tokens == 0:
        return
    windows = [row.prompt[-context:] for row in rows]
    static = max_new_tokens >= COMPILE_MIN_TOKENS and has_triton(device)
    if static:
        model.compile_decoding(mode="reduce-overhead")
        windows += [[0]] * (
            padded_batch_size(len(rows)) - len(rows)
        )  # what fills up the batch is one token that nobody sees
    room = context if static else min(context, max(map(len, windows)) + max_new_tokens)
    with model.autocast():
        cache = KVCache(model.config, len(windows), room, device, cache_dtype(device), static)
    step = model if static else as_plain_objects(model)
    logits = prefill(model, windows, cache)[: len(rows)]
    while True:
        seen = [row.prompt + row.generated for row in rows] if sampling.repetition_penalty != 1 else [[]] * len(rows)
        tokens = choose(logits, sampling, generators, seen)
        if top_logprobs:
            for row, logprobs in zip(rows, token_logprobs(logits, tokens, top_logprobs), strict=True):
                row.logprobs = logprobs
        for row, token in zip(rows, tokens, strict=True):
            if token == end_of_text:
                row.finish_reason = "end_of_text"
                continue
            row.generated.append(token)
            if len(row.generated) == max_new_tokens:
                row.finish_reason = "length"
            yield row
        kept = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if not kept:
            return
        if len(kept) < len(rows):
            rows, generators = [rows[index] for index in kept], [generators[index] for index in kept]
            cache.select_rows(kept)
        logits = _next(step, rows, cache, context)


def padded_batch_size(rows: int) -> int:
    """Rows of the cache of a compiled step: the next power of two, so that few sizes of a batch are compiled."""
    return 1 << (rows - 1).bit_length()


def prefill(model: Transformer, windows: list[list[int]], cache: KVCache) -> Tensor:
    """Fill an empty cache with rows of any lengths and return the logits of what comes next.

    Shapes:
        returns (B, V)
    """
    counts = [len(window) for window in windows]
    # Shorter rows are filled up on the right with any token: nothing looks at it.
    padded = [window + [0] * (max(counts) - len(window)) for window in windows]
    return model.next_logits(torch.tensor(padded, device=cache.device), cache, counts)


def _next(model: Transformer, rows: list[Sequence], cache: KVCache, context: int) -> Tensor:
    """The logits after each row's newest token, (B, V)."""
    full = [index for index in range(len(rows)) if cache.lengths[index] == context] if cache.length == context else []
    for index in full:
        window = cache.row(index)
        window.clear()
        tokens = (rows[index].prompt + rows[index].generated)[-(context // 2 or 1) :]
        if tokens[:-1]:
            model.hidden(torch.tensor([tokens[:-1]], device=cache.device), window)
    spare = len(cache.lengths) - len(rows)  # of a static cache: see slots_for
    cache.lengths[len(rows) :] = 0
    newest = torch.tensor([[row.generated[-1]] for row in rows] + [[0]] * spare, device=cache.device)
    return model.next_logits(newest, cache)[: len(rows)]
