"""Generate token ids with a key-value cache: the engine of evaluations, commands, the server and notebooks.

`prefill` reads the prompts, then each round chooses a token for every sequence and runs one `decode_step`.

Shapes: B sequences in progress, V vocabulary.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed.device_info import has_triton
from myllm.errors import UserError
from myllm.model.kv_cache import KVCache
from myllm.model.transformer import Transformer

from .cpu_decode import as_plain_objects
from .sampling import TokenLogprobs, choose, token_logprobs
from .sampling_params import SamplingParams

COMPILE_MIN_TOKENS = 512
"""On CUDA, texts of at least this many new tokens compile the decode step. Compilation is too slow for shorter ones.

Only in the main thread: a CUDA graph belongs to its thread. In another, such as one of the server's requests, torch
before 2.13 fails, and later versions record each step anew (pytorch/pytorch#123177).
"""

FinishReason = Literal["end_of_text", "length", "stop"]


class LanguageModel(NamedTuple):
    """A model and its tokenizer. Unpacks: `model, tokenizer = load_model(...)`."""

    model: Transformer
    tokenizer: Tokenizer


@dataclass
class Sequence:
    """A prompt and its continuation. Set `finish_reason` to stop it early."""

    prompt: list[int]
    seed: int
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    """Of the newest token, end-of-text included; only with `top_logprobs`."""


def stream_tokens(
    model: Transformer, prompt: list[int], max_new_tokens: int, sampling: SamplingParams, end_of_text: int | None = None
) -> Iterator[int]:
    """Continue one prompt, one token id at a time. See `generate_batch`.

    Raises:
        UserError: empty prompt or invalid sampling parameters. Raised at the call.
    """
    batch = [Sequence(prompt, sampling.seed)]
    steps = generate_batch(model, batch, max_new_tokens, sampling, end_of_text)
    return (sequence.generated[-1] for sequence in steps)


def generate_batch(
    model: Transformer,
    batch: list[Sequence],
    max_new_tokens: int,
    sampling: SamplingParams,
    end_of_text: int | None = None,
    top_logprobs: int = 0,
) -> Iterator[Sequence]:
    """Continue prompts of any lengths together, until `end_of_text` (which is not appended) or `max_new_tokens`.

    Yields a sequence whenever it has a new token, in turn. The text of a sequence depends on its prompt and seed and,
    up to rounding, not on the other sequences; the global random state is unchanged. When a sequence reaches the
    context length, its older half is dropped and its newer half read again. Of a prompt longer than the context, only
    the last tokens are read.

    Args:
        model: in evaluation mode.
        sampling: for all sequences, except the seed: each sequence has its own.
        top_logprobs: if above 0, set `Sequence.logprobs` at each token, with this many most likely tokens.

    Raises:
        UserError: empty prompt or invalid sampling parameters. Raised at the call, not at the first token.
    """
    if not all(sequence.prompt for sequence in batch):
        raise UserError("the prompt is empty: give at least one token to start from")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, but must be at least 0")
    sampling.check()
    if max_new_tokens == 0:
        for sequence in batch:
            sequence.finish_reason = "length"
    if max_new_tokens == 0 or not batch:
        return iter(())
    return _generate(model, list(batch), max_new_tokens, sampling, end_of_text, top_logprobs)


@torch.inference_mode()
def _generate(
    model: Transformer,
    batch: list[Sequence],
    max_new_tokens: int,
    sampling: SamplingParams,
    end_of_text: int | None,
    top_logprobs: int,
) -> Iterator[Sequence]:
    generators = [torch.Generator().manual_seed(sequence.seed) for sequence in batch]
    in_main_thread = threading.current_thread() is threading.main_thread()
    long = max_new_tokens >= COMPILE_MIN_TOKENS
    compiled = long and in_main_thread and has_triton(next(model.parameters()).device)
    if compiled:
        model.compile_decoding(mode="reduce-overhead")
    decoder = model if compiled else as_plain_objects(model)
    logits, cache = prefill(model, batch, max_new_tokens, compiled)
    while True:
        seen = [sequence.prompt + sequence.generated for sequence in batch] if sampling.penalizes_repetition else []
        tokens = choose(logits, sampling, generators, seen)
        if top_logprobs:
            for sequence, logprobs in zip(batch, token_logprobs(logits, tokens, top_logprobs), strict=True):
                sequence.logprobs = logprobs
        for sequence, token in zip(batch, tokens, strict=True):
            if token == end_of_text:
                sequence.finish_reason = "end_of_text"
                continue
            sequence.generated.append(token)
            if len(sequence.generated) == max_new_tokens:
                sequence.finish_reason = "length"
            yield sequence
        unfinished = [index for index, sequence in enumerate(batch) if sequence.finish_reason is None]
        if not unfinished:
            return
        if len(unfinished) < len(batch):
            batch, generators = [batch[index] for index in unfinished], [generators[index] for index in unfinished]
            cache.select_rows(unfinished)
        logits = decode_step(decoder, batch, cache)


def prefill(model: Transformer, batch: list[Sequence], max_new_tokens: int, static: bool) -> tuple[Tensor, KVCache]:
    """Read the prompts into a new cache.

    Args:
        static: the cache has a fixed shape, for compiled steps.

    Shapes:
        returns the logits of the next tokens, (B, V)
    """
    device, context = next(model.parameters()).device, model.config.max_seq_len
    prompts = [sequence.prompt[-context:] for sequence in batch]
    capacity = min(context, max(map(len, prompts)) + max_new_tokens)
    if static:
        # Batch sizes are rounded up to powers of two, so that few are compiled. Unused rows hold one dummy token.
        capacity, rows = context, 1 << (len(batch) - 1).bit_length()
        prompts += [[0]] * (rows - len(batch))
    counts = [len(prompt) for prompt in prompts]
    padded = [prompt + [0] * (max(counts) - len(prompt)) for prompt in prompts]  # tokens on the right are ignored
    cache = model.make_cache(len(prompts), capacity, static)
    logits = model.next_logits(torch.tensor(padded, device=device), cache, counts)
    return logits[: len(batch)], cache


def decode_step(model: Transformer, batch: list[Sequence], cache: KVCache) -> Tensor:
    """The logits after the newest token of each sequence.

    Shapes:
        returns (B, V)
    """
    context = model.config.max_seq_len
    if cache.length == context:
        for index, sequence in enumerate(batch):
            if cache.lengths[index] == context:
                row = cache.row(index)
                row.clear()
                window = (sequence.prompt + sequence.generated)[-(context // 2 or 1) : -1]
                if window:
                    model.hidden(torch.tensor([window], device=cache.device), row)
    cache.lengths[len(batch) :] = 0  # unused rows of a static cache
    newest = [[sequence.generated[-1]] for sequence in batch] + [[0]] * (len(cache.lengths) - len(batch))
    tokens = torch.tensor(newest, device=cache.device)
    try:
        return model.next_logits(tokens, cache)[: len(batch)]
    except Exception as error:
        # torch compiles a limited number of shapes, and raises at the next one before it computes anything.
        if type(error).__name__ != "FailOnRecompileLimitHit":  # of torch._dynamo.exc, which is slow to import
            raise
        cache.static = False
        return model.next_logits(tokens, cache)[: len(batch)]
