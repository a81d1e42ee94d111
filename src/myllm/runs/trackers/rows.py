"""Which rows of metrics.jsonl a tracker has already, and which figures of a row it gets."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from myllm.files import atomic_write, parse_row
from myllm.migrations import TRACKER
from myllm.runs.history import read_json_or_empty

NOT_SHOWN = {"step", "sample_digest_since_step", "protocol", "seconds", "data_wait_s"}


class NewRows:
    """The rows of a file that grows, as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The valid rows since the last iteration. A line without its end is left for the next one."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith(b"\n"):
                self._offset += len(line)
                row = parse_row(line.decode("utf-8", "replace"), self._path)
                if row is not None:
                    yield row


class SentRows:
    """What a tracker has of a run: the last step of training and of each evaluation, in a file of the run's folder.

    A run that resumes from a checkpoint repeats the steps after it. A tracker that cannot take rows back keeps those
    of the first time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        values = TRACKER.upgrade(read_json_or_empty(path), path)
        self.id: str = values.get("id") or secrets.token_hex(4)
        self.last_steps: dict[str, int] = values.get("last_steps", {})

    def take(self, row: dict[str, Any]) -> dict[str, float]:
        """The figures of a row that the tracker does not have; empty if there are none."""
        kind = row.get("kind")
        if kind not in ("train", "eval"):
            return {}
        name = "train" if kind == "train" else str(row.get("name"))
        if row["step"] <= self.last_steps.get(name, -1):
            return {}
        self.last_steps[name] = row["step"]
        return {
            f"{name}/{key}": float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in NOT_SHOWN
        }

    def save(self) -> None:
        with atomic_write(self._path, durable=False) as file:
            file.write(json.dumps(TRACKER.stamp({"id": self.id, "last_steps": self.last_steps})).encode() + b"\n")
