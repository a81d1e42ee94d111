"""Garbage collection after scheduled steps, on all ranks at once.

Python frees most objects by their reference counts; the collector is for cycles. By itself it runs after a number of
allocations: on each rank at another moment, while the other ranks wait for that rank's gradients.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100


class GcSchedule:
    """Turns off automatic collection inside a `with` block."""

    def __init__(self, step: int) -> None:
        """
        Args:
            step: updates that were complete when this process began.
        """
        self._first = step + 1

    def __enter__(self) -> "GcSchedule":
        self._was_enabled = gc.isenabled()
        gc.disable()
        _freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if it is time. Only the step decides, so all ranks collect together, while the device is busy."""
        if step == self._first:  # torch.compile has finished
            _freeze()
        elif step % EVERY_STEPS == 0:
            gc.collect()

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Python's own schedule, for evaluations: their garbage may hold much memory."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
            gc.collect()


def _freeze() -> None:
    """Exempt what exists (modules, the model, compiled code) from later collections, which then take milliseconds."""
    gc.collect()
    gc.freeze()
