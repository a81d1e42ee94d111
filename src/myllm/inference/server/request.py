"""From the body of a request to checked settings. Without torch: a bad request costs nothing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from myllm.errors import UserError, did_you_mean
from myllm.files import parse_json
from myllm.inference.sampling_params import SamplingParams

MAX_NEW_TOKENS = 100_000


@dataclass(frozen=True)
class GenerateRequest:
    """One text to write."""

    prompt: str
    """Empty: begin a new document."""
    max_new_tokens: int
    sampling: SamplingParams


def parse_request(body: bytes, default: GenerateRequest) -> GenerateRequest:
    """What a JSON object asks for; a key that it leaves out is as in `default`.

    Raises:
        UserError: no such object, or settings unknown or out of range, all of them named.
    """
    given = parse_json(body, "the request")
    if not isinstance(given, dict):
        raise UserError('the request is no JSON object: send one such as {"prompt": "Once", "temperature": 0.7}')
    base = to_settings(default)
    faults = [f"unknown setting {key!r}{did_you_mean(key, list(base))}" for key in given if key not in base]
    values = {**base}
    for key in base.keys() & given.keys():
        try:
            values[key] = _as(type(base[key]), given[key])
        except ValueError as error:
            faults.append(f"{key} {json.dumps(given[key])[:80]}: {error}")
    prompt, max_new_tokens = values.pop("prompt"), values.pop("max_new_tokens")
    asked = GenerateRequest(prompt, max_new_tokens, SamplingParams(**values))
    check_request(asked, faults)
    return asked


def to_settings(asked: GenerateRequest) -> dict[str, Any]:
    """The keys of a request and their values: those of `Sampling`, `prompt` and `max_new_tokens`."""
    own = {field.name: getattr(asked.sampling, field.name) for field in fields(SamplingParams)}
    return {"prompt": asked.prompt, "max_new_tokens": asked.max_new_tokens, **own}


def check_request(asked: GenerateRequest, faults: Sequence[str] = ()) -> None:
    """
    Args:
        faults: those already found.

    Raises:
        UserError: names every setting out of range: what it is and what it may be.
    """
    faults = [*faults, *asked.sampling.faults()]
    if not 0 <= asked.max_new_tokens <= MAX_NEW_TOKENS:
        faults.append(f"max_new_tokens {asked.max_new_tokens}: give a whole number from 0 to {MAX_NEW_TOKENS:,}")
    if faults:
        raise UserError("cannot write so:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _as(kind: type, value: object) -> str | int | float:
    """The value as a text, a whole number or a number, where it is one."""
    if kind is str:
        if not isinstance(value, str):
            raise ValueError("give a text")
        return value
    whole = kind is int
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError("give a whole number" if whole else "give a number")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError("give a smaller number") from None
