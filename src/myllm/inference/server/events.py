"""Generated tokens as JSON objects, with their log-probabilities and those of the most likely tokens."""

import time
from collections.abc import Generator
from typing import Any

from myllm.data.tokenizer.base import Tokenizer
from myllm.inference.completion import TextStream
from myllm.inference.generate import LanguageModel, Sequence, generate_batch
from myllm.inference.sampling import TokenLogprobs

from .request import GenerateRequest

TOP_LOGPROBS = 8  # as many as the page shows at a glance
Event = dict[str, Any]


def generate_events(model: LanguageModel, request: GenerateRequest) -> Generator[Event, None, None]:
    """Generate one text, with the same engine as `myllm sample`: the same seed gives the same text.

    First `{"kind": "start", "prompt_tokens", "unread_tokens"}`: only the end of a prompt longer than the context is
    read. Then for each token `{"kind": "token", "text", "token", "logprob", "rank", "top_logprobs"}`, where `text` is
    empty until a character is complete. Then `{"kind": "end", "text", "finish_reason", "tokens", "seconds"}`, with the
    log-probabilities of end-of-text where the model ended the document.
    """
    tokenizer, end_of_text = model.tokenizer, model.tokenizer.end_of_text
    sequence = Sequence(tokenizer.encode_document(request.prompt).tolist(), request.sampling.seed)
    prompt_tokens, context = len(sequence.prompt), model.model.config.max_seq_len
    yield {"kind": "start", "prompt_tokens": prompt_tokens, "unread_tokens": max(0, prompt_tokens - context)}
    started, stream = time.perf_counter(), TextStream(tokenizer)
    for _ in generate_batch(
        model.model, [sequence], request.max_new_tokens, request.sampling, end_of_text, top_logprobs=TOP_LOGPROBS
    ):
        token = sequence.generated[-1]
        yield {"kind": "token", "text": stream.feed(token), **_token_event(tokenizer, token, sequence.logprobs)}
    end = _token_event(tokenizer, end_of_text, sequence.logprobs) if sequence.finish_reason == "end_of_text" else {}
    yield {
        "kind": "end", "text": stream.end(), "finish_reason": sequence.finish_reason,
        "tokens": len(sequence.generated), "seconds": time.perf_counter() - started, **end,
    }  # fmt: skip


def _token_event(tokenizer: Tokenizer, token: int, logprobs: TokenLogprobs | None) -> Event:
    assert logprobs is not None
    return {
        "token": token_to_json(tokenizer, token), "logprob": logprobs.logprob, "rank": logprobs.rank,
        "top_logprobs": [{**token_to_json(tokenizer, other), "logprob": value} for other, value in logprobs.top],
    }  # fmt: skip


def token_to_json(tokenizer: Tokenizer, token: int) -> Event:
    """A token's id, and its `text` or, if it is not valid UTF-8, its `bytes` in hexadecimal."""
    raw = tokenizer.decode_bytes([token])
    try:
        return {"id": token, "text": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token, "bytes": raw.hex(" ")}
