"""Training that is hit by faults, in processes that start at once; and how what is left of it is looked at."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from support.processes import with_words

from myllm.cli.prove_resume.training_process import train_rows
from myllm.paths import RunPaths

Record = dict[int, tuple[float, str]]
"""Loss and receipt by step."""
Goes = Callable[[str], None]
"""The fixture `goes_on`."""
SCRIPT = Path(__file__).parents[1] / "faults/pretrain_forks.py"


@dataclass(frozen=True)
class Ended:
    code: int
    """Negative for a signal."""
    said: str


class Forks:
    """pretrain.py with words of one's own on two ranks, each time in fresh processes that start at once."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        config: Path,
        *words: str,
        on: tuple[int, ...] = (0, 1),
        kill_all: bool = False,
        data: Path | None = None,
        **fault: Any,
    ) -> Ended:
        """
        Args:
            on: the ranks that the faults befall.
            kill_all: once a rank has failed, kill the other; else it is told to end, as torchrun does.
        """
        out = self.folder / "out.txt"
        words = ["--config", str(config), *words]
        request = {"words": words, "data": str(data or self.data), "out": str(out), "fault": fault, "on": on}
        request["all"] = kill_all
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        assert not with_words(psutil.Process(self.process.pid).children(recursive=True), ""), (
            "processes are left behind"
        )
        return Ended(code, out.read_text(errors="replace"))


def run_of(place: Path, name: str) -> RunPaths:
    return RunPaths(place / "temp_data" / "runs" / name)


def record(run: RunPaths) -> Record:
    """Loss and receipt by step; a step that was written twice fails."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rows = train_rows(run)
    assert len(rows) == len([line for line in lines if line["kind"] == "train"]), "a step was logged twice"
    return {step: (row["loss"], row["sample_digest"]) for step, row in rows.items()}


def receipts(run: RunPaths) -> dict[int, str]:
    return {step: receipt for step, (_, receipt) in record(run).items()}


def assert_tidy(folder: Path) -> None:
    """No temporary file or folder is left: nothing hidden but the lock, and what DCP calls its index."""
    left = [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
    assert {path.name for path in left} <= {".lock", ".metadata"}, left
