"""The variables of the libraries that a program of this project loads; most it sets, in its first moment.

They are read once, when a library is loaded, and its child processes inherit them.
"""

import os

from .cpu_threads import usable_cores
from .launcher import is_launched, local_world_size

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""By any of these a user has chosen how threads wait."""
ALLOCATING = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""By any of these, how torch's allocator works."""


def set_library_env() -> None:
    """Before torch and Matplotlib are loaded: threads sleep while they wait, ranks share the cores to compile on,
    CUDA's memory grows in place, and pictures go to files.

    OpenMP's threads by default spin where they wait for one another, and take the processor from whoever they wait for
    if something else runs beside them (docs/experiments.md).
    """
    if not any(os.environ.get(name) for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # One process that compiles for each core and each rank would be hundreds on a machine of eight GPUs: torch knows
    # nothing of the other ranks.
    if is_launched() and local_world_size() > 1:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(usable_cores() // local_world_size(), 1)))
    # CUDA's memory in pieces that grow: evaluations, whose shapes vary, leave no holes that training cannot use. Read
    # when the first tensor goes to a GPU; torch 2.8 knows the second name alone, and does as it used to.
    if not any(os.environ.get(name) for name in ALLOCATING):
        os.environ[ALLOCATING[0]] = "expandable_segments:True"
    # Notebooks hand theirs to every command that they start; to a program without it, it is an error at import.
    os.environ["MPLBACKEND"] = "agg"


def visible_gpus() -> str | None:
    """Which GPUs of the machine the user lets CUDA see; None: nothing said, so all."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return value if value is None else value.strip()
