"""Versions of the JSON files that this program writes, and what became of the keys of earlier ones.

A file says which version of its kind it is. One that says nothing is of version 1, as all were before versions. Readers
call `Schema.upgrade` on what they read, so nothing else in the code knows an old name.

- A new key needs no entry here: give it a default that means what the program did before there was the key.
- A key that was renamed or dropped, or values that were renamed, are a `Change` at the end of the kind's table. That
  makes a new version, which programs without the change refuse to read.
- Never use an old name again for something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError

VERSION = "version"


@dataclass(frozen=True)
class Change:
    """What one version changed about a kind of file. A key inside objects is written "train.max_steps"."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """New keys by old ones. They may lead from one object into another."""
    removed: tuple[str, ...] = ()
    """Keys that are dropped, whatever they say."""
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By key (its new name): new values by old ones."""


@dataclass(frozen=True)
class Schema:
    """A kind of file."""

    name: str
    """As messages call it."""
    changes: tuple[Change, ...] = ()
    """From version 1 to 2, from 2 to 3, and so on."""

    @property
    def version(self) -> int:
        """Of the files that this program writes."""
        return 1 + len(self.changes)

    def stamp(self, content: dict[str, Any]) -> dict[str, Any]:
        """Content to write, with the version in front."""
        return {VERSION: self.version, **content}

    def upgrade(self, content: dict[str, Any], where: object = None) -> dict[str, Any]:
        """What was read, by today's keys and without its version. The argument stays as it is.

        Args:
            where: the file, for messages.

        Raises:
            UserError: a later version of this program wrote it, or the version is no number.
        """
        content = _copy(content)
        version = content.pop(VERSION, 1)
        shown = f"the {self.name} {where}" if where else f"the {self.name}"
        if type(version) is not int or version < 1:
            raise UserError(f"the version of {shown} is {version!r}, expected a whole number from 1 to {self.version}")
        if version > self.version:
            raise UserError(
                f"{shown} is of version {version}, and this program reads versions up to {self.version}: a later "
                "version of MyLLM wrote it; update this one (git pull)"
            )
        for change in self.changes[version - 1 :]:
            _apply(change, content)
        return content


CONFIG = Schema(
    "config",
    (Change(renamed={"data.normalise_unicode": "data.normalize_unicode"}),),
)
"""A RunConfig: config.json of runs, checkpoints and anomaly dumps, and the files of --config."""
STATE = Schema("training state", (Change({"receipt": "sample_digest"}),))
"""A TrainState: state.json of checkpoints."""
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
"""heartbeat.json, with the words for what a run does and how it ended."""
ROW = Schema("row", (Change({"receipt": "sample_digest", "receipt_since_step": "sample_digest_since_step"}),))
"""A line of metrics.jsonl or samples.jsonl. Lines carry no version: all changes are made to each."""


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _apply(change: Change, content: dict[str, Any]) -> None:
    # All are taken out before any is put back, so that two keys may change names with each other.
    moved = [(new, _take(content, old)) for old, new in change.renamed.items()]
    for key in change.removed:
        _take(content, key)
    for key, found in moved:
        if found:
            _put(content, key, found[0])
    for key, renamed in change.values.items():
        if (found := _take(content, key)) is not None:
            _put(content, key, renamed.get(found[0], found[0]) if isinstance(found[0], str) else found[0])


def _take(content: dict[str, Any], key: str) -> tuple[Any] | None:
    """The value of a key, which is then gone; None where it is not there."""
    *outer, last = key.split(".")
    for name in outer:
        content = content.get(name)  # type: ignore[assignment]
        if not isinstance(content, dict):
            return None
    return (content.pop(last),) if last in content else None


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):  # nothing that this program wrote; the reader says what is wrong with it
            return
        content = inner
    content.setdefault(last, value)
