"""Parse and check the body of a request. Without torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from myllm.errors import UserError, did_you_mean
from myllm.files import parse_json
from myllm.inference.sampling_params import SamplingParams

MAX_NEW_TOKENS = 100_000


class HttpError(Exception):
    """A rejected request: the HTTP status of the response and, for OpenAI's clients, the setting and a code."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class GenerateRequest:
    """One text to generate."""

    prompt: str
    """Empty: start a new document."""
    max_new_tokens: int
    sampling: SamplingParams
    model: str = ""
    """Its name; empty: the first model of the server."""


def parse_request(body: bytes, default: GenerateRequest) -> GenerateRequest:
    """The request in a JSON object; missing keys are as in `default`.

    Raises:
        UserError: not a JSON object, or unknown or invalid settings; names all of them.
    """
    given = parse_json(body, "the request")
    if not isinstance(given, dict):
        raise UserError('the request must be a JSON object, such as {"prompt": "Once", "temperature": 0.7}')
    values = to_settings(default)
    errors = [f"unknown setting {key!r}{did_you_mean(key, list(values))}" for key in given if key not in values]
    for key in values.keys() & given.keys():
        try:
            values[key] = convert(type(values[key]), given[key])
        except ValueError as error:
            errors.append(f"{key} {json.dumps(given[key])[:80]}: {error}")
    own = {key: values.pop(key) for key in ("prompt", "max_new_tokens", "model")}
    request = GenerateRequest(**own, sampling=SamplingParams(**values))
    check_request(request, errors)
    return request


def to_settings(request: GenerateRequest) -> dict[str, Any]:
    """A request as one flat dictionary."""
    return {
        "model": request.model,
        "prompt": request.prompt,
        "max_new_tokens": request.max_new_tokens,
        **asdict(request.sampling),
    }


def check_request(request: GenerateRequest, errors: Sequence[str] = ()) -> None:
    """
    Args:
        errors: found before.

    Raises:
        UserError: names all errors.
    """
    errors = [*errors, *request.sampling.errors()]
    if not 0 <= request.max_new_tokens <= MAX_NEW_TOKENS:
        errors.append(f"max_new_tokens {request.max_new_tokens}: give an integer from 0 to {MAX_NEW_TOKENS:,}")
    if errors:
        raise UserError("\n".join(["invalid request:", *(f"  - {error}" for error in errors)]))


def convert(kind: type, value: object) -> Any:
    """The value as `kind`: str, int or float.

    Raises:
        ValueError: it has another type.
    """
    if kind is str:
        if not isinstance(value, str):
            raise ValueError("give a string")
        return value
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise ValueError("give an integer" if kind is int else "give a number")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError("give a smaller number") from None
