"""The CPU cores and threads of this process. No torch: the processes that tokenize use this too."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .launcher import local_world_size, thread_count_variable


def usable_cores() -> int:
    """Logical cores that the scheduler allows this process, fewer in a container with a CPU quota."""
    cores = _affinity()
    return _within_quota(len(cores) if cores else os.cpu_count() or 1)


def num_threads() -> int | None:
    """Threads for arithmetic: this process's share of the physical cores.

    A second logical core per physical one adds next to nothing to a matrix product. The number depends only on the
    machine and its ranks, since another number of threads can change the last bits of a loss.

    Returns:
        None if the user has chosen, or the system does not say: torch's own number is used.
    """
    cores = _affinity()
    if thread_count_variable() or not cores:
        return None
    return max(_within_quota(_physical(cores)) // local_world_size(), 1)


def threads_reason() -> str:
    """Where the number of threads comes from, for the log."""
    if variable := thread_count_variable():
        return f"set by {variable}"
    ranks = local_world_size()
    return f"{usable_cores()} usable core(s)" + (f" for {ranks} processes" if ranks > 1 else "")


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _physical(logical: set[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """The number of physical cores behind these logical ones."""
    try:
        siblings = {Path(system, f"cpu{core}", "topology", "thread_siblings_list").read_text() for core in logical}
    except OSError:
        return len(logical)
    return len(siblings)


def _within_quota(cores: int, control: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """`cores`, limited by the CPU quota. With one thread more, the kernel would pause all of them regularly."""
    return max(min([cores, *(int(quota) for quota in _quotas(control, own))]), 1)


def _quotas(control: Path, own: Path) -> Iterator[float]:
    """The quotas of this process's control group and its parents, in cores.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (version 1).
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    files: tuple[str, ...]
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            root, files = control, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            root, files = control / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (root / group, *(root / parent for parent in group.parents)):
            # A missing file, or "max": no quota. In version 1 that is -1.
            with suppress(OSError, ValueError):
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                if int(quota) > 0:
                    yield int(quota) / int(period)
