"""Tokens as they come, each with its probability and the runners-up, as objects that go over the wire."""

import time
from collections.abc import Iterator
from typing import Any

from myllm.data.tokenizer.base import Tokenizer
from myllm.inference.completion import TextStream
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.language_model import LanguageModel
from myllm.inference.sampling import TokenLogprobs

from .request import GenerateRequest

TOP_LOGPROBS = 8  # as many as a small window beside a token shows at a glance
Event = dict[str, Any]


def generate_events(model: LanguageModel, asked: GenerateRequest) -> Iterator[Event]:
    """Generate one text, with the same engine as `myllm sample`: the same seed gives the same text.

    First `{"kind": "start", "prompt_tokens", "unread_tokens"}`: only the end of a prompt longer than the context is
    read. Then for each token `{"kind": "token", "text", "token", "logprob", "rank", "top_logprobs"}`, where `text` is
    empty until a character is complete. Then
    `{"kind": "end", "text", "finish_reason", "tokens", "seconds"}`, with the log-probabilities of end-of-text where the
    model ended the document.
    """
    row = Sequence(model.tokenizer.encode_document(asked.prompt).tolist(), asked.sampling.seed)
    count, context = len(row.prompt), model.model.config.max_seq_len
    yield {"kind": "start", "prompt_tokens": count, "unread_tokens": max(0, count - context)}
    began = time.perf_counter()
    end_of_text, stream = model.tokenizer.end_of_text, TextStream(model.tokenizer)
    for _ in generate_batch(
        model.model, [row], asked.max_new_tokens, asked.sampling, end_of_text, top_logprobs=TOP_LOGPROBS
    ):
        token = row.generated[-1]
        yield {"kind": "token", "text": stream.feed(token), **_figures(model.tokenizer, token, row.logprobs)}
    ended = _figures(model.tokenizer, end_of_text, row.logprobs) if row.finish_reason == "end_of_text" else {}
    yield {
        "kind": "end", "text": stream.end(), "finish_reason": row.finish_reason, "tokens": len(row.generated),
        "seconds": time.perf_counter() - began, **ended,
    }  # fmt: skip


def _figures(tokenizer: Tokenizer, token: int, logprobs: TokenLogprobs | None) -> Event:
    assert logprobs is not None
    top = [{**token_to_json(tokenizer, other), "logprob": value} for other, value in logprobs.top]
    return {
        "token": token_to_json(tokenizer, token), "logprob": logprobs.logprob, "rank": logprobs.rank,
        "top_logprobs": top,
    }  # fmt: skip


def token_to_json(tokenizer: Tokenizer, token: int) -> Event:
    """A token by itself: its `text`, or its `bytes` in hexadecimal where they are no whole characters."""
    raw = tokenizer.decode_bytes([token])
    try:
        return {"id": token, "text": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token, "bytes": raw.hex(" ")}
