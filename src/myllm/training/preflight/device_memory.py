"""Memory of a device: what a process can have, its peak, and work within a limit.

On CUDA and MPS this is the device's memory, as torch's allocator counts it; on a CPU the resident set of the process.
"""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar, cast

import torch

from myllm.config import RunConfig
from myllm.distributed import collectives as distributed
from myllm.distributed import launcher
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.distributed.out_of_memory import is_out_of_memory
from myllm.errors import UserError
from myllm.formatting import format_gib
from myllm.planning.memory_estimate import HEADROOM, ComputeMode, predicted_bytes

OTHER_RANKS_S = 120.0
"""How long a rank that is out of memory waits for the others to run out too. A compiler may delay one of them."""

T = TypeVar("T")


class OutOfMemory(Exception):
    """At least one rank ran out of device memory. Raised on every rank."""


def available_bytes(device: torch.device) -> int:
    """Memory that this process can have: what it holds now, and what is free; of a CPU's memory, which this machine's
    processes of the run share, its fraction."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return proc_bytes("/proc/self/status", "VmRSS") + _free_ram_bytes() // launcher.local_world_size()


def check_memory(config: RunConfig, device: torch.device, world_size: int) -> None:
    """Refuse a run that Linux would kill. Other devices refuse the memory themselves, and other systems swap.

    Args:
        config: train.micro_batch_size is a number, or "auto", which is found by trial.

    Raises:
        UserError: on a CPU, a rank's predicted memory is more than what is available.
    """
    size = config.train.micro_batch_size
    if device.type != "cpu" or sys.platform != "linux" or size == "auto":
        return
    needed = predicted_bytes(config, ComputeMode.of(config, "cpu", world_size))
    available = available_bytes(device)
    if needed > available:
        raise UserError(
            f"train.micro_batch_size {size:,} needs about {format_gib(needed)} of memory per rank, but only "
            f"{format_gib(available)} is available; set it to auto, which finds the largest that fits, or end other "
            "programs; if not even 1 fits, lower model.max_seq_len, model.n_layers or model.d_model"
        )


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # Without Linux's resettable mark: since the process began.
    scale = 1 if sys.platform == "darwin" else 1_024
    return proc_bytes("/proc/self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak(device: torch.device) -> None:
    """Return unused memory, and start counting again."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        with suppress(OSError, AttributeError):  # only glibc keeps freed memory, and has this function
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            # Source: Linux, Documentation/filesystems/proc.rst: 5 resets the peak of the resident set.
            Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def memory_limit(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """On CUDA, fail allocations beyond the limit, as if the device had no more memory. Elsewhere it does nothing."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit_bytes / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def memory_limit_bytes(dist: DistContext) -> int:
    """What a run may use on each rank: the available memory of the rank with the least, minus headroom."""
    return int(min(distributed.all_gather_object(available_bytes(dist.device))) * (1 - HEADROOM))


def run_within_memory(work: Callable[[], T], dist: DistContext, limit_bytes: int) -> tuple[T, int]:
    """Run part of a training run within a memory limit.

    All ranks have the same limit, so they run out at the same allocation, and none waits for another in a collective.
    A rank that runs out alone ends the trial for all: the others may be in a collective that it will never join.

    Returns:
        the result of `work`, and the peak in bytes on the rank that used most.

    Raises:
        OutOfMemory: some rank needs more.
        UserError: only this rank needs more.
    """
    result, failed = None, False
    reset_peak(dist.device)
    with memory_limit(dist.device, limit_bytes):
        try:
            result = work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
    if not distributed.all_ranks_arrive("memory", OTHER_RANKS_S if failed else 0.0):
        raise UserError(
            f"out of memory on rank {dist.rank} ({device_name(dist.device)}) alone: the other ranks have not run out "
            f"of memory within {OTHER_RANKS_S:,.0f} s; free this device of other programs, or lower "
            "train.micro_batch_size"
        )
    peak = max(distributed.all_gather_object(peak_bytes(dist.device)))
    (failed,) = distributed.all_reduce_any(failed)
    if failed or peak > limit_bytes:
        raise OutOfMemory
    return cast(T, result), peak


def _free_ram_bytes() -> int:
    """Free RAM of the machine, or of the container if that has less."""
    free = proc_bytes("/proc/meminfo", "MemAvailable")
    if not free:  # not Linux: assume half of all RAM
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for root, limit_file, used_file in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit, used = (int(Path(root, name).read_text()) for name in (limit_file, used_file))
            free = min(free, max(limit - used + _file_cache_bytes(root), 0))
    return free


def _file_cache_bytes(control_group: str) -> int:
    """Pages of files that count as used memory of a container, and that Linux gives up when memory is needed."""
    for line in Path(control_group, "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def proc_bytes(file: str, key: str) -> int:
    """A value that Linux reports in kB; 0 on other systems."""
    with suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1_024
    return 0
