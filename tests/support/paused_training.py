"""pretrain.py that waits after a step, so that a test which acts then finds the run in its middle, however late it is.
It draws no report.

The command line is pretrain.py's; where to wait is in the environment, which a launcher hands on to its ranks.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve()
VARIABLE = "MYLLM_TESTS_PAUSE"


@dataclass(frozen=True)
class Pause:
    """Each rank waits once it has logged a step, until `go_on`. Ranks that come there later do not."""

    step: int
    folder: Path
    """Of this pause alone."""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def reached(self, ranks: int = 1) -> bool:
        return len(list(self.folder.glob("rank*"))) == ranks

    def go_on(self) -> None:
        (self.folder / "go").touch()

    def wait(self) -> None:
        """In a rank."""
        (self.folder / f"rank{os.environ.get('RANK', 0)}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.02)


def variables(*pauses: Pause) -> dict[str, str]:
    """Of the environment of a process that pauses there."""
    return {VARIABLE: json.dumps({pause.step: str(pause.folder) for pause in pauses})}


def patch_training(pauses: dict[int, Pause]) -> None:
    from myllm.training import loop

    real = loop.train_step

    def train_step(trainer: Any, number: int, *phase: Any) -> Any:
        if number in pauses:
            pauses[number].wait()
        return real(trainer, number, *phase)

    loop.train_step = train_step


if __name__ == "__main__":
    sys.path.insert(0, str(PROGRAM.parents[2]))
    import pretrain

    places = json.loads(os.environ.get(VARIABLE, "{}"))
    pretrain.draw_report = lambda run: None
    patch_training({int(step): Pause(int(step), Path(folder)) for step, folder in places.items()})
    pretrain.main()
