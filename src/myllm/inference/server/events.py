"""Tokens as they come, each with its probability and the runners-up, as objects that go over the wire."""

import time
from collections.abc import Iterator
from typing import Any

from myllm.data.tokenizer.load import Tokenizer
from myllm.inference.completion import TextStream
from myllm.inference.generate import Continuation, continue_batch
from myllm.inference.language_model import LanguageModel
from myllm.inference.sampling import Likelihood

from .request import Asked

LIKELIEST = 8  # as many as a small window beside a token shows at a glance
Event = dict[str, Any]


def written(model: LanguageModel, asked: Asked) -> Iterator[Event]:
    """One text, by the same engine as `myllm sample` and so the same text for the same seed.

    First `{"kind": "start", "prompt_tokens", "unread_tokens"}`: of a prompt beyond the context, the first are not
    read. Then for each token `{"kind": "token", "text", "token", "probability", "rank", "likeliest"}`, `text` being
    what it adds: nothing while a character is not whole. Then `{"kind": "end", "text", "finish", "tokens", "seconds"}`,
    and, where the model ended the document, the figures of that decision.
    """
    row = Continuation(model.tokenizer.encode_document(asked.prompt).tolist(), asked.sampling.seed)
    count, context = len(row.prompt), model.model.config.max_seq_len
    yield {"kind": "start", "prompt_tokens": count, "unread_tokens": max(0, count - context)}
    began = time.perf_counter()
    end_of_text, stream = model.tokenizer.end_of_text, TextStream(model.tokenizer)
    for _ in continue_batch(model.model, [row], asked.max_new_tokens, asked.sampling, end_of_text, likeliest=LIKELIEST):
        token = row.written[-1]
        yield {"kind": "token", "text": stream.feed(token), **_figures(model.tokenizer, token, row.likelihood)}
    ended = _figures(model.tokenizer, end_of_text, row.likelihood) if row.finish == "end_of_text" else {}
    yield {
        "kind": "end", "text": stream.end(), "finish": row.finish, "tokens": len(row.written),
        "seconds": time.perf_counter() - began, **ended,
    }  # fmt: skip


def _figures(tokenizer: Tokenizer, token: int, likelihood: Likelihood | None) -> Event:
    assert likelihood is not None
    likeliest = [{**spell(tokenizer, each), "probability": value} for each, value in likelihood.likeliest]
    return {
        "token": spell(tokenizer, token), "probability": likelihood.probability, "rank": likelihood.rank,
        "likeliest": likeliest,
    }  # fmt: skip


def spell(tokenizer: Tokenizer, token: int) -> Event:
    """A token by itself: its `text`, or its `bytes` in hexadecimal where they are no whole characters."""
    raw = tokenizer.decode_bytes([token])
    try:
        return {"id": token, "text": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token, "bytes": raw.hex(" ")}
