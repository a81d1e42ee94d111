"""Versions of the JSON files that this program writes, and the changes between them.

Each file has the version of its format; without one, it is version 1. Readers call `Schema.upgrade`, so no other code
knows an old name.

- To add a key, give it a default that means what the program did before. No change is needed here.
- To rename or drop a key, append a `Change` to the schema. This makes a new version, which older programs refuse.
- Never reuse an old name.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UserError, did_you_mean

VERSION = "version"


@dataclass(frozen=True)
class Change:
    """The difference between two versions of a format. A nested key is written "train.max_steps"."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Old key to new key, which may be in another object."""
    removed: tuple[str, ...] = ()
    """Keys that are dropped."""


@dataclass(frozen=True)
class Schema:
    """A file format and its history."""

    name: str
    """For messages."""
    changes: tuple[Change, ...] = ()
    """From version 1 to 2, from 2 to 3, and so on."""

    @property
    def version(self) -> int:
        """The version that this program writes."""
        return 1 + len(self.changes)

    def stamp(self, content: dict[str, Any]) -> dict[str, Any]:
        """Content to write, with the version."""
        return {VERSION: self.version, **content}

    def upgrade(self, content: dict[str, Any], source: object = None) -> dict[str, Any]:
        """A copy of what was read, with the keys of the current version and without the version itself.

        Args:
            source: the file, for messages.

        Raises:
            UserError: the file has a later version, or an invalid one.
        """
        content = _copy(content)
        version = content.pop(VERSION, 1)
        shown = f"the {self.name} {source}" if source else f"the {self.name}"
        if type(version) is not int or version < 1:
            raise UserError(f"the version of {shown} is {version!r}, expected an integer from 1 to {self.version}")
        if version > self.version:
            raise UserError(
                f"{shown} has version {version}, but this program reads versions up to {self.version}: it was written "
                "by a later version of MyLLM; update this one (git pull)"
            )
        for change in self.changes[version - 1 :]:
            _apply(change, content)
        return content


CONFIG = Schema(
    "config",
    (Change(renamed={"data.normalise_unicode": "data.normalize_unicode"}),),
)
"""RunConfig: config.json of runs, checkpoints and anomaly dumps, and files given by --config."""
STATE = Schema(
    "training state",
    (
        Change(
            renamed={
                "receipt": "sample_digest",
                "early_stop.counted_step": "early_stop.last_step",
                "skips.in_a_row": "skips.consecutive",
                "skips.counted": "skips.norm_count",
                "skips.scaled_steps": "skips.steps_at_scale",
            }
        ),
    ),
)
"""TrainState: state.json of checkpoints."""
ANOMALY = Schema(
    "anomaly dump",
    (
        Change(
            renamed={
                "in_a_row": "consecutive",
                "bad_again": "reproduced",
                "bad_weights": "nonfinite_weights",
                "bad_gradients": "nonfinite_gradients",
                "first_bad": "first_nonfinite",
                "first_bad_backward": "first_nonfinite_backward",
                "faults": "errors",
            },
            removed=("format",),
        ),
    ),
)
"""anomaly.json, which was bag.json in version 1."""
HEARTBEAT = Schema("heartbeat")
"""heartbeat.json of runs."""
LADDER_RATES = Schema("rates file")
"""rates.json of a ladder."""
LADDER = Schema("ladder")
"""ladder.json."""
TUNE = Schema("search")
"""tune.json of a search."""
TRACKER = Schema("tracker's record")
"""trackers/NAME.json of runs."""
ROW = Schema("row", (Change({"receipt": "sample_digest", "receipt_since_step": "sample_digest_since_step"}),))
"""A line of metrics.jsonl or samples.jsonl. Lines have no version: all changes are applied to each."""


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _apply(change: Change, content: dict[str, Any]) -> None:
    # Take all values out before putting any back, so that two keys may swap names.
    moved = [(new, _take(content, old)) for old, new in change.renamed.items()]
    for key in change.removed:
        _take(content, key)
    for key, found in moved:
        if found:
            _put(content, key, found[0])


def _take(content: dict[str, Any], key: str) -> tuple[Any] | None:
    """Remove a key. Returns its value in a tuple, or None if it is missing."""
    *outer, last = key.split(".")
    for name in outer:
        inner = content.get(name)
        if not isinstance(inner, dict):
            return None
        content = inner
    return (content.pop(last),) if last in content else None


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):  # not written by this program; the reader reports it
            return
        content = inner
    content.setdefault(last, value)


# -- JSON to dataclasses ----------------------------------------------------------------------------------------------


def dataclass_from_json(kind: Any, values: Any, errors: list[str], base: Any = None, prefix: str = "") -> Any:
    """Make a dataclass from JSON values, checking names and types. Reverses `dataclasses.asdict`.

    Args:
        kind: the dataclass. Its fields may be nested dataclasses, unions, literals, tuples and plain types.
        errors: gets a line for each unknown or missing key and each value of the wrong type; the result is then
            meaningless.
        base: supplies the values of missing keys. None: they have the defaults of their fields.
    """
    if not isinstance(values, dict):
        errors.append(f"{prefix.rstrip('.') or 'the config'}: expected an object of settings, found {values!r}")
        return base
    hints, changes = typing.get_type_hints(kind), {}
    for key, value in values.items():
        if key not in hints:
            errors.append(f"{prefix}{key}: unknown key{did_you_mean(key, list(hints))}")
            continue
        nested = [hint for hint in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(hint)]
        if nested and (value is not None or hints[key] is nested[0]):
            changes[key] = dataclass_from_json(nested[0], value, errors, getattr(base, key, None), f"{prefix}{key}.")
        else:
            try:
                changes[key] = _convert(value, hints[key])
            except TypeError as error:
                errors.append(f"{prefix}{key}: expected {error}, found {value!r}")
    if base is not None:
        return dataclasses.replace(base, **changes)
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and f.default is f.default_factory]
    errors.extend(f"{prefix}{name}: missing" for name in missing)
    return kind(**changes) if not errors else None


def _convert(value: Any, hint: Any) -> Any:
    """A JSON value as the annotated type. The message of a TypeError says what was expected."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in choices:
            raise TypeError("one of " + ", ".join(map(str, choices)) if len(choices) > 1 else repr(choices[0]))
        return value
    if origin in (types.UnionType, typing.Union):  # `X | None`, or `int | Literal["auto"]`
        return _convert_to_union(value, choices)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(_convert(item, choices[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # JSON writes 1e9 as a float
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError({int: "an integer", float: "a number", str: "a string", bool: "true or false"}[hint])
    return value


def _convert_to_union(value: Any, choices: tuple[Any, ...]) -> Any:
    """Convert to the first type that accepts the value. Messages do not mention None."""
    if value is None and types.NoneType in choices:
        return None
    expected = []
    for choice in choices:
        if choice is not types.NoneType:
            try:
                return _convert(value, choice)
            except TypeError as error:
                expected.append(str(error))
    raise TypeError(" or ".join(expected))
