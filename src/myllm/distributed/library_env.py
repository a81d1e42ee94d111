"""Environment variables of the libraries. They are read when a library is loaded, and inherited by child processes."""

import os
import platform

from .cpu_threads import usable_cores
from .launcher import is_launched, local_world_size

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""If one is set, the user has chosen how threads wait."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_library_env() -> None:
    """Call before torch and Matplotlib are loaded."""
    # By default OpenMP's threads spin while they wait, and take the CPU from other work (docs/experiments.md).
    if not any(os.environ.get(name) for name in WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # torch's default is one compile process per core in each rank: hundreds on a machine with eight GPUs.
    if is_launched() and local_world_size() > 1:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(usable_cores() // local_world_size(), 1)))
    # CUDA memory in segments that grow: evaluations, whose shapes vary, then leave no gaps that training cannot use.
    # Read when the first tensor goes to a GPU. Not in Windows' Linux, whose driver fails then (pytorch/pytorch#192330).
    if "microsoft" not in platform.release().lower() and not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    # Notebooks pass their backend on to commands that they start, where importing Matplotlib would then fail.
    os.environ["MPLBACKEND"] = "agg"


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES; None: all GPUs."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return value if value is None else value.strip()
