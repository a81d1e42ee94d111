"""Requests of OpenAI's completions API. Without torch.

Source: https://platform.openai.com/docs/api-reference/completions and .../chat.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any

from myllm.errors import did_you_mean
from myllm.files import parse_json

from .request import MAX_NEW_TOKENS, GenerateRequest, HttpError, convert

Prompt = str | list[int]
Converters = dict[str, Callable[[Any], Any]]

MAX_TEXTS = 128
"""Of one request: prompts x n."""
MAX_LOGPROBS = 20
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "logprobs": (False,), "top_logprobs": (0,),
}  # fmt: skip
"""Settings of the API that this server does not have, with the values that change nothing."""
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "prompt_cache_key",
    "prompt_cache_retention", "tools", "functions",
}  # fmt: skip
"""Settings that do not change the text: a base model calls none of the tools that Open WebUI always offers."""


@dataclass(frozen=True)
class CompletionRequest:
    """Texts to generate: `n` for each prompt. Text k of a prompt has the seed `sampling.seed` + k."""

    model: str
    prompts: list[Prompt]
    """Texts, or the ids of their tokens."""
    default: GenerateRequest
    """Length and sampling; its prompt is not used."""
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Streams end with the numbers of tokens."""
    logprobs: int | None
    """Return the log-probability of each token, and this many most likely tokens."""
    echo: bool
    """Return the prompt before the text."""
    chat: bool
    """A request to chat/completions."""


def parse_completion(body: bytes, default: GenerateRequest, models: Sequence[str], chat: bool) -> CompletionRequest:
    """The request in a JSON object. Missing settings are as in `default`, but the seed is random.

    Args:
        models: names of the models; a request without one takes the first.

    Raises:
        HttpError: an unknown model, or unknown or invalid settings; names all of them.
    """
    given = parse_json(body, "the request")
    if not isinstance(given, dict):
        raise HttpError(HTTPStatus.BAD_REQUEST, 'the request must be a JSON object, such as {"prompt": "Once"}')
    values, errors = _convert_settings(given, CHAT if chat else COMPLETION)
    model = values.get("model", models[0])
    if model not in models:
        message = f"no model {model!r}; models: {', '.join(models)}"
        raise HttpError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")
    if chat and "messages" not in given:
        errors["messages"] = "give at least one message"
    sampled = {key: values[key] for key in SAMPLING if key in values}
    sampling = replace(default.sampling, **{"seed": secrets.randbelow(2**31), **sampled})
    max_tokens = values.get("max_completion_tokens", values.get("max_tokens", default.max_new_tokens))
    prompts, n = [values.get("messages", "")] if chat else values.get("prompt", [""]), values.get("n", 1)
    if not 1 <= n * len(prompts) <= MAX_TEXTS:
        errors["n"] = f"{n} for each of {len(prompts)} prompts: give 1 to {MAX_TEXTS} texts"
    if not 0 <= max_tokens <= MAX_NEW_TOKENS:
        errors["max_tokens"] = f"{max_tokens}: give an integer from 0 to {MAX_NEW_TOKENS:,}"
    lines = [f"{key} {error}" for key, error in errors.items()]
    if lines or (lines := list(sampling.errors())):
        param = next(iter(errors), lines[0].split()[0])
        raise HttpError(HTTPStatus.BAD_REQUEST, "invalid request: " + "; ".join(lines), param)
    return CompletionRequest(
        model, prompts, GenerateRequest("", max_tokens, sampling), n, values.get("stop", ()),
        stream=values.get("stream", False), include_usage=values.get("stream_options", False),
        logprobs=values.get("logprobs"), echo=values.get("echo", False), chat=chat,
    )  # fmt: skip


def _convert_settings(given: dict[str, Any], convert_by_key: Converters) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that are not null, and what is wrong with the others."""
    values: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for key, value in given.items():
        if value is None or key in IGNORED:
            continue
        if key in convert_by_key:
            try:
                values[key] = convert_by_key[key](value)
            except ValueError as error:
                errors[key] = f"{str(value)[:80]!r}: {error}"
        elif key not in NEUTRAL:
            errors[key] = f"is unknown{did_you_mean(key, list(convert_by_key))}"
        elif value not in NEUTRAL[key]:
            errors[key] = "is not supported: leave it out"
    return values, errors


def _prompts(value: object) -> list[Prompt]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_ids(value):
            return [value]
        if all(isinstance(prompt, str) or _is_ids(prompt) for prompt in value):
            return value
    raise ValueError("give a string, a list of strings, the ids of a text's tokens, or a list of such ids")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _join_messages(value: object) -> str:
    """The text of all messages, one after another: a base model knows no roles."""
    if not isinstance(value, list) or not value:
        raise ValueError("give at least one message")
    texts: list[str] = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise ValueError('give messages such as {"role": "user", "content": "Once"}, with text only')
        texts.append("".join(part["text"] for part in parts))
    return "\n".join(texts)


def _stop(value: object) -> tuple[str, ...]:
    stop = (value,) if isinstance(value, str) else value
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError("give a string or a list of strings, none of them empty")
    return tuple(stop)


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("give true or false")
    return value


def _logprobs(value: object) -> int | None:
    if value is False:
        return None
    if not isinstance(value, int) or not 0 <= value <= MAX_LOGPROBS:
        raise ValueError(f"give an integer from 0 to {MAX_LOGPROBS}")
    return int(value)


def _include_usage(value: object) -> bool:
    if not isinstance(value, dict):
        raise ValueError('give an object such as {"include_usage": true}')
    return _boolean(value.get("include_usage", False))


INTEGER, NUMBER, STRING = partial(convert, int), partial(convert, float), partial(convert, str)
COMMON: Converters = {
    "model": STRING, "max_tokens": INTEGER, "n": INTEGER, "stop": _stop, "stream": _boolean,
    "stream_options": _include_usage, "temperature": NUMBER, "top_p": NUMBER, "top_k": INTEGER, "min_p": NUMBER,
    "repetition_penalty": NUMBER, "seed": INTEGER,
}  # fmt: skip
COMPLETION: Converters = {**COMMON, "prompt": _prompts, "logprobs": _logprobs, "echo": _boolean}
CHAT: Converters = {**COMMON, "messages": _join_messages, "max_completion_tokens": INTEGER}
