"""The variables of the libraries that a program of this project loads; most it sets, in its first moment.

They are read once, when a library is loaded, and its child processes inherit them.
"""

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""By any of these a user has chosen how threads wait."""


def set_for_libraries() -> None:
    """Before torch and Matplotlib are loaded: threads sleep while they wait, and pictures go to files.

    OpenMP's threads by default spin where they wait for one another, and take the processor from whoever they wait for
    if something else runs beside them (docs/experiments.md).
    """
    if not any(os.environ.get(name) for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # Notebooks hand theirs to every command that they start; to a program without it, it is an error at import.
    os.environ["MPLBACKEND"] = "agg"


def visible_gpus() -> str | None:
    """Which GPUs of the machine the user lets CUDA see; None: nothing said, so all."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return value if value is None else value.strip()
