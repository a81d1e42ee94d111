"""What a launcher tells a process: the only reader of RANK, LOCAL_RANK and WORLD_SIZE. Knows no torch, which is slow to
import: command lines and the processes that tokenise start with this.
"""

import os

from .errors import UserError


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_world_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def world_size() -> int:
    """Processes of the run; before it is launched, WORLD_SIZE says for how many it is being planned.

    Raises:
        UserError: WORLD_SIZE is no number of processes.
    """
    value = os.environ.get("WORLD_SIZE") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"WORLD_SIZE is {value!r}, expected a number of processes; unset it to train with one")
    return int(value)
