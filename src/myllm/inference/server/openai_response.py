"""Responses of OpenAI's completions API: texts from the engine of `myllm sample`, as objects or as chunks of a stream.

Source: https://platform.openai.com/docs/api-reference/completions/object and .../chat/streaming.
"""

import secrets
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import torch

from myllm.data.tokenizer.base import Tokenizer
from myllm.inference.completion import TextStream
from myllm.inference.generate import LanguageModel, Sequence, generate_batch
from myllm.inference.sampling import TokenLogprobs, token_logprobs

from .openai_request import CompletionRequest, Prompt
from .request import HttpError

BATCH_SIZE = 16
"""Texts generated together."""
FINISH_REASONS = {"end_of_text": "stop", "stop": "stop", "length": "length"}
LOGPROBS_ROWS = 256
"""Positions of a prompt whose log-probabilities over the vocabulary are in memory together."""


@dataclass
class Piece:
    """New text of one choice, with its tokens if log-probabilities were requested."""

    index: int
    text: str
    tokens: list[dict[str, Any]]
    finish_reason: str | None = None
    """Set on the last piece."""


class Choice:
    """A text in progress. Text that may be part of a stop string is held back, with its tokens."""

    def __init__(self, index: int, sequence: Sequence, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        self.index, self.sequence, self.tokenizer, self.request = index, sequence, tokenizer, request
        self.stream = TextStream(tokenizer, request.stop)
        self.length = 0
        """Characters released so far."""
        self.held: list[dict[str, Any]] = []

    def echo(self, text: str, ids: list[int], logprobs: list[TokenLogprobs | None]) -> Piece:
        """The prompt, as the beginning of the text."""
        stream = TextStream(self.tokenizer)
        for token, token_logprob in zip(ids, logprobs, strict=True):
            self.held.append(self._entry(token, self.length, token_logprob))
            self.length += len(stream.feed(token))
        tokens, self.held, self.length = self.held, [], len(text)
        return Piece(self.index, text, tokens)

    def feed(self) -> Piece:
        """The text that is final after the newest token."""
        token = self.sequence.generated[-1]
        if self.request.logprobs is not None:
            self.held.append(self._entry(token, self.length + len(self.stream.held), self.sequence.logprobs))
        text = self.stream.feed(token)
        if self.stream.stopped:
            self.sequence.finish_reason = "stop"
        self.length += len(text)
        return Piece(self.index, text, self._release(self.length))

    def end(self) -> Piece:
        """The text held back, and how the text ended. Tokens of a stop string are left out."""
        text, reason = self.stream.end(), self.sequence.finish_reason
        assert reason is not None
        self.length += len(text)
        tokens = [] if self.stream.stopped else self.held
        return Piece(self.index, text, tokens, FINISH_REASONS[reason])

    def _release(self, end: int) -> list[dict[str, Any]]:
        tokens = [entry for entry in self.held if entry["offset"] < end]
        self.held = self.held[len(tokens) :]
        return tokens

    def _entry(self, token: int, offset: int, logprobs: TokenLogprobs | None) -> dict[str, Any]:
        spell, top = self._spell, None
        if logprobs is not None and self.request.logprobs:
            top = {spell(other): value for other, value in logprobs.top[: self.request.logprobs]}
            top[spell(token)] = logprobs.logprob  # of OpenAI's, too, the chosen token is always one
        return {"token": spell(token), "logprob": logprobs and logprobs.logprob, "top": top, "offset": offset}

    def _spell(self, token: int) -> str:
        """A token as text; OpenAI's form for bytes that are no whole character."""
        raw = self.tokenizer.decode_bytes([token])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Completion:
    """One request with its model: generates `pieces`, and then knows the numbers of tokens.

    Raises:
        HttpError: a prompt is longer than the context, or has ids that are not in the vocabulary.
    """

    def __init__(self, model: LanguageModel, request: CompletionRequest) -> None:
        self.model, self.request = model, request
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.prompts = [self._encode(prompt) for prompt in request.prompts]
        self.completion_tokens = 0

    def _encode(self, prompt: Prompt) -> list[int]:
        tokenizer, context = self.model.tokenizer, self.model.model.config.max_seq_len
        if isinstance(prompt, str):
            ids = tokenizer.encode_document(prompt).tolist()
            if self.request.chat:  # as `myllm chat`: the beginning of a long conversation is dropped
                return ids[-max(context - self.request.default.max_new_tokens, context // 2, 1) :]
        elif wrong := [token for token in prompt if not 0 <= token < tokenizer.vocab_size]:
            message = f"prompt has the id {wrong[0]}, but ids are from 0 to {tokenizer.vocab_size - 1:,}"
            raise HttpError(HTTPStatus.BAD_REQUEST, message, "prompt")
        else:
            ids = prompt
        if len(ids) > context:
            message = f"prompt has {len(ids):,} tokens, but the model's context is {context:,}: shorten it"
            raise HttpError(HTTPStatus.BAD_REQUEST, message, "prompt", "context_length_exceeded")
        return ids

    def pieces(self) -> Generator[Piece, None, None]:
        """Generate all texts, `BATCH_SIZE` together."""
        request = self.request
        choices = [
            Choice(number, Sequence(ids, (request.default.sampling.seed + number % request.n) % 2**63),
                   self.model.tokenizer, request)
            for number, ids in enumerate(ids for ids in self.prompts for _ in range(request.n))
        ]  # fmt: skip
        for first in range(0, len(choices), BATCH_SIZE):
            yield from self._batch(choices[first : first + BATCH_SIZE])

    def _batch(self, choices: list[Choice]) -> Iterator[Piece]:
        request, default = self.request, self.request.default
        if request.echo:
            yield from map(self._echo, choices)
        by_sequence = {id(choice.sequence): choice for choice in choices}
        top = 0 if request.logprobs is None else max(request.logprobs, 1)
        for sequence in generate_batch(
            self.model.model, [choice.sequence for choice in choices], default.max_new_tokens, default.sampling,
            self.model.tokenizer.end_of_text, top_logprobs=top,
        ):  # fmt: skip
            self.completion_tokens += 1
            yield by_sequence[id(sequence)].feed()
        yield from (choice.end() for choice in choices)

    def _echo(self, choice: Choice) -> Piece:
        prompt, ids = self.request.prompts[choice.index // self.request.n], choice.sequence.prompt
        if isinstance(prompt, str):
            text, start = prompt, 1  # the document's start is not part of the text
        else:
            text, start = self.model.tokenizer.decode(prompt), 0
        if self.request.logprobs is None:
            return Piece(choice.index, text, [])
        logprobs = [None, *prompt_logprobs(self.model, ids, max(self.request.logprobs, 1))]
        return choice.echo(text, ids[start:], logprobs[start:])

    def usage(self) -> dict[str, int]:
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The response of a request without `stream`, from all pieces."""
        joined = [Piece(index, "", []) for index in range(len(self.prompts) * self.request.n)]
        for piece in pieces:
            choice = joined[piece.index]
            choice.text += piece.text
            choice.tokens += piece.tokens
            choice.finish_reason = piece.finish_reason
        kind = "chat.completion" if self.request.chat else "text_completion"
        return {**self._object(kind, list(map(self._choice, joined))), "usage": self.usage()}

    def chunks(self) -> Generator[dict[str, Any], None, None]:
        """The response of a request with `stream`. A chunk may have no text, as a token may have none."""
        kind = "chat.completion.chunk" if self.request.chat else "text_completion"
        usage = {"usage": None} if self.request.include_usage else {}
        for piece in self.pieces():
            yield {**self._object(kind, [self._choice(piece)]), **usage}
        if self.request.include_usage:
            yield {**self._object(kind, []), "usage": self.usage()}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.request.model, "choices": choices
        }  # fmt: skip

    def _choice(self, piece: Piece) -> dict[str, Any]:
        common = {"index": piece.index, "logprobs": self._logprobs(piece), "finish_reason": piece.finish_reason}
        if self.request.chat:
            name = "delta" if self.request.stream else "message"
            return {name: {"role": "assistant", "content": piece.text}, **common}
        return {"text": piece.text, **common}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        return {
            "tokens": [entry["token"] for entry in piece.tokens],
            "token_logprobs": [entry["logprob"] for entry in piece.tokens],
            "top_logprobs": [entry["top"] for entry in piece.tokens] if self.request.logprobs else None,
            "text_offset": [entry["offset"] for entry in piece.tokens],
        }


@torch.inference_mode()
def prompt_logprobs(model: LanguageModel, ids: list[int], count: int) -> list[TokenLogprobs]:
    """The log-probability of each token but the first, with the `count` most likely tokens in its place."""
    transformer = model.model
    device = next(transformer.parameters()).device
    hidden = transformer.hidden(torch.tensor([ids], device=device))  # (1, T, d_model)
    rows = []
    for start in range(0, len(ids) - 1, LOGPROBS_ROWS):
        chosen = ids[start + 1 : start + 1 + LOGPROBS_ROWS]
        with transformer.autocast():
            logits = transformer.logits(hidden[0, start : start + len(chosen)])  # (rows, V)
        rows += token_logprobs(logits, chosen, count)
    return rows
