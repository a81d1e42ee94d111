"""The processor's cores that this process may use. Knows no torch: the processes that tokenise ask too."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .launcher import local_world_size, thread_count_variable


def usable_cores() -> int:
    """Logical cores: those that the scheduler gives this process, fewer where a container has a quota of their time."""
    mine = _affinity()
    return _within_quota(len(mine) if mine else os.cpu_count() or 1)


def num_threads() -> int | None:
    """Threads for this process's arithmetic: its share of the physical cores that the machine's ranks may use.

    The second logical core of a physical one adds next to nothing to a matrix product. The number depends on the
    machine and its ranks alone: another one can change the last bits of a loss.

    Returns:
        None where the user has chosen, or on a system that does not say: torch's own number stands then.
    """
    mine = _affinity()
    if thread_count_variable() or not mine:
        return None
    return max(_within_quota(_physical(mine)) // local_world_size(), 1)


def threads_reason() -> str:
    """Why it is that number of threads, for the log."""
    if asked := thread_count_variable():
        return f"as {asked} says"
    ranks = local_world_size()
    return f"{usable_cores()} usable core(s)" + (f" for {ranks} processes" if ranks > 1 else "")


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _physical(logical: set[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many physical cores these logical ones are."""
    try:
        shared = {Path(system, f"cpu{each}", "topology", "thread_siblings_list").read_text() for each in logical}
    except OSError:
        return len(logical)
    return len(shared)


def _within_quota(cores: int, control: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """So many cores, or what the quota of CPU time is worth: one thread more, and all would be stopped now and then."""
    return max(min([cores, *(int(quota) for quota in _quotas(control, own))]), 1)


def _quotas(control: Path, own: Path) -> Iterator[float]:
    """In cores: of this process's control group and all above it.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (version 1).
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        kinds, _, place = line.partition(":")[2].partition(":")
        if not kinds:
            root, files = control, ("cpu.max",)
        elif "cpu" in kinds.split(","):
            root, files = control / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        group = Path(place.lstrip("/"))
        for folder in (root / group, *(root / above for above in group.parents)):
            # No such file, or "max": no quota here. In version 1 that is -1.
            with suppress(OSError, ValueError):
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                if int(quota) > 0:
                    yield int(quota) / int(period)
