"""Memory of a device: what a process has used at most, what there is for it, and how to keep it within a limit.

On CUDA and MPS that is the device's memory, as torch's allocator counts it; on a CPU it is the process's resident set.
"""

import ctypes
import errno
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

REFUSALS = (
    "out of memory",  # CUDA's, HIP's and MPS's allocators, the CUDA runtime (cudaErrorMemoryAllocation), Triton, NCCL
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",
    "std::bad_alloc",
    "ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuFFT
    "ALLOCATION_FAILED",  # cuDNN, from version 9
    "Failed to CUDA calloc",  # NCCL
)
"""What a RuntimeError says that is a refusal of memory. Source: torch's c10/cuda, ATen/cuda/Exceptions and c10d."""


def available_bytes(device: torch.device, processes: int = 1) -> int:
    """What this process can have in all: what it holds already, and its share of what nobody holds.

    Args:
        processes: of this run on this machine, which share a CPU's memory; each has its own CUDA device.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return _proc_bytes("/proc/self/status", "VmRSS") + _free_ram_bytes() // processes


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # Since the process began, where the system keeps no mark that can be reset.
    scale = 1 if sys.platform == "darwin" else 1_024
    return _proc_bytes("/proc/self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak(device: torch.device) -> None:
    """Give back what is not in use, and count from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        with suppress(OSError, AttributeError):  # glibc alone keeps freed memory, and has this
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            # Source: Linux, Documentation/filesystems/proc.rst: 5 resets the peak of the resident set.
            Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def memory_limit(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """On CUDA, refuse this process more than so much, as if the device had no more. Elsewhere nothing is enforced."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit_bytes / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device's, or the host's, refusal of more memory, or was raised because of one."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and any(said in str(error) for said in REFUSALS):
        return True
    # A compiler that tries its kernels wraps what one of them raised.
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause is not None and is_out_of_memory(cause)


def _free_ram_bytes() -> int:
    """RAM that can still be had: of the machine, or of the container where that has less."""
    free = _proc_bytes("/proc/meminfo", "MemAvailable")
    if not free:  # no Linux: half of all there is, for want of better
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for root, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            most, now = (int(Path(root, name).read_text()) for name in (limit, used))
            free = min(free, max(most - now, 0))
    return free


def _proc_bytes(file: str, key: str) -> int:
    """A figure that Linux gives in kB; 0 where there is none."""
    with suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1_024
    return 0
