"""The process group, its device, and collectives.

Under torchrun each process is one rank. Without it there is one rank, and every collective returns its argument.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from myllm.errors import MachineError, UserError, out_of_space

from .cpu_threads import num_threads
from .device_info import cuda_device_count, cuda_problem, gpu_problem
from .launcher import is_launched, local_rank, rank, warn_while_waiting, world_size

T = TypeVar("T")
COLLECTIVE_TIMEOUT_S = 1_800.0
"""Ranks may reach a collective at very different times: they compile, save and evaluate in between."""


@dataclass(frozen=True)
class DistContext:
    """This process among the processes of the run."""

    rank: int
    """Among all processes on all machines."""
    local_rank: int
    """Among the processes on this machine; selects the GPU."""
    world_size: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """Rank 0 writes the files and prints."""
        return self.rank == 0


@contextmanager
def process_group(device: str) -> Iterator[DistContext]:
    """Join the run's processes for a `with` block, and use this process's share of the machine's cores.

    Args:
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: the device does not exist, torch cannot use it, or several processes want MPS.
    """
    chosen = training_device(device, local_rank())
    if chosen.type == "mps" and is_launched() and world_size() > 1:
        raise UserError(
            f"{world_size()} processes were started, but MPS is one device and PyTorch has no collectives for it; "
            "start one process, or use --train.device cpu"
        )
    context = DistContext(rank(), local_rank(), world_size() if is_launched() else 1, chosen)
    if threads := num_threads():
        torch.set_num_threads(threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if context.world_size > 1:
        # gloo carries host tensors and objects, such as the stop flag, so that they never wait for the device.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        with warn_while_waiting():
            dist.init_process_group(backend, timeout=timeout, device_id=chosen if chosen.type == "cuda" else None)
    yield context
    # Not after an error: while other ranks are in a collective, destroying the group may block forever.
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device to use; "auto" prefers CUDA, then MPS, then the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    counts = {"cpu": 1, "cuda": cuda_device_count(), "mps": int(torch.backends.mps.is_available())}
    if device == "auto":
        device = "cuda" if counts["cuda"] else "mps" if counts["mps"] else "cpu"
    if device not in counts:
        raise UserError(f"unknown device {device!r}, expected auto or one of {', '.join(counts)}")
    if not counts[device] or (device == "cuda" and local_rank >= counts["cuda"]):
        usable = ", ".join(name for name, count in counts.items() if count)
        problem = cuda_problem() if device == "cuda" and not counts["cuda"] else None
        raise UserError(
            f"torch sees {counts[device]} {device} device(s), too few for process {local_rank} of this machine; "
            f"usable: {usable} (auto selects the best){f'. {problem}' if problem else ''}"
        )
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)


def training_device(device: str, local_rank: int = 0) -> torch.device:
    """As `choose_device`, but an error instead of the CPU if there is a GPU that torch cannot use.

    Raises:
        UserError: no such device, or a GPU that this torch does not support.
    """
    chosen = choose_device(device, local_rank)
    problem = None
    if device == "auto" and chosen.type == "cpu":
        problem = cuda_problem()
    elif chosen.type == "cuda":
        problem = gpu_problem(chosen)
    if problem:
        raise MachineError(f"{problem}. To train on the CPU instead, use --train.device cpu")
    return chosen


# -- collectives: every rank calls them; with one process they return their argument ----------------------------------


def all_reduce_sum(values: Tensor) -> Tensor:
    """The element-wise sum over ranks."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_any(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set on any rank."""
    if not dist.is_initialized():
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in tensor)


def all_ranks() -> dist.ProcessGroup | None:
    """The group of all ranks; None with one rank."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def barrier() -> None:
    all_reduce_any(False)  # dist.barrier would run on the device; this is on gloo


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def all_gather_object(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank, on every rank of a group (None: all)."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def group_rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def new_background_group() -> dist.ProcessGroup | None:
    """A group of all ranks for work beside training, so that its messages never mix with training's. All ranks call
    it; None with one process."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=30)) if dist.is_initialized() else None


# -- the shared store: communication without a collective, for ranks that may be stuck --------------------------------


def shared_store() -> dist.Store | None:
    """A key-value store that all ranks share; None with one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    # A separate connection: another thread may be waiting on the first.
    return dist.PrefixStore("board", store.clone() if hasattr(store, "clone") else store)


def all_ranks_arrive(place: str, timeout_s: float) -> bool:
    """Whether every rank reaches this place, for the same number of times, within the timeout.

    A stuck rank need not call it. With a timeout of 0 a rank only signals its arrival.
    """
    store = shared_store()
    if store is None:
        return True
    visit = store.add(f"{place}/{dist.get_rank()}", 1)
    store.set(f"{place}/{dist.get_rank()}/{visit}", "here")
    if timeout_s:
        try:
            keys = [f"{place}/{rank}/{visit}" for rank in range(dist.get_world_size())]
            store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return False
    return True


# -- errors on other ranks --------------------------------------------------------------------------------------------


class RemoteRankError(RuntimeError):
    """A function failed on another rank."""


def run_on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Call a function on every rank of a group. Every rank gets all results, by rank, or an error.

    Raises:
        Exception: what `function` raised on this rank.
        RemoteRankError: it failed on other ranks only. An OSError or UserError is raised again as such.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    answers = all_gather_object((result, _error_summary(error)), group)
    if error:
        raise error
    for number, (_, summary) in enumerate(answers):
        if summary is None:
            continue
        error_number, is_user_error, text = summary
        if error_number:
            raise OSError(error_number, f"{text} (on rank {number})")
        raise UserError(text) if is_user_error else RemoteRankError(f"rank {number}: {text}")
    return [answer for answer, _ in answers]


def _error_summary(error: Exception | None) -> tuple[int | None, bool, str] | None:
    """Error number, whether it is a UserError, and text: not every exception can be pickled."""
    if error is None:
        return None
    number = errno.ENOSPC if out_of_space(error) else getattr(error, "errno", None)
    is_user_error = isinstance(error, UserError)
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return number, is_user_error, text if number or is_user_error else f"{type(error).__name__}: {text}"
