"""When Python looks for garbage: after steps that are due, and not in the middle of one.

Most of what training drops is freed at once, by its count of references. The collector is for cycles. By itself it runs
whenever enough objects were made: on each rank at another moment, while the others wait for its gradients. Here it runs
on all ranks after the same steps.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100


class GcSchedule:
    """Keeps Python from collecting garbage by itself, as a context, but for the times that it says."""

    def __init__(self, step: int) -> None:
        """
        Args:
            step: updates that were complete when this process began.
        """
        self._first = step + 1

    def __enter__(self) -> "GcSchedule":
        self._enabled = gc.isenabled()
        gc.disable()
        _settle()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._enabled:
            gc.enable()

    def after(self, step: int) -> None:
        """Collect, if it is time: the step alone decides, so all ranks do it together. A device is busy meanwhile."""
        if step == self._first:  # it has compiled
            _settle()
        elif step % EVERY_STEPS == 0:
            gc.collect()

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """As Python does it, for what is no training and may leave garbage that holds much memory."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
            gc.collect()


def _settle() -> None:
    """Take what is there (modules, the model, what was compiled) to live as long as the run: it is not looked at again
    until the end, so that later collections take milliseconds."""
    gc.collect()
    gc.freeze()
