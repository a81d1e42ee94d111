"""Ranks, devices and collectives.

Under torchrun every process is one rank of a group; without it there is one rank and every collective is the identity.
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
"""How long a collective may take where ranks do things of very different lengths: compiling, saving, evaluating."""


@dataclass(frozen=True)
class DistContext:
    """This process among those of the run."""

    rank: int
    """Among all processes of all machines."""
    local_rank: int
    """Among those of this machine; chooses the GPU."""
    world_size: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """Writes the files and talks to the user: global rank 0."""
        return self.rank == 0


@contextmanager
def process_group(device: str) -> Iterator[DistContext]:
    """Join the run's processes for the length of a `with` block, with this one's share of the machine's cores.

    Args:
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: no such device on this machine, one that torch cannot use, or several processes for one of MPS.
    """
    chosen = training_device(device, local_rank())
    if chosen.type == "mps" and is_launched() and world_size() > 1:
        raise UserError(
            f"{world_size()} processes were started, but MPS is one device and PyTorch has no collectives for it; "
            "start one process, or give --train.device cpu"
        )
    process = DistContext(rank(), local_rank(), world_size() if is_launched() else 1, chosen)
    if threads := num_threads():
        torch.set_num_threads(threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if process.world_size > 1:
        # gloo carries what lives on the host (the stop flag, objects), so that it never waits for the device.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        with warn_while_waiting():
            dist.init_process_group(
                backend,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
                device_id=chosen if chosen.type == "cuda" else None,
            )
    yield process
    # Not after an error: where others are still in a collective, to take the group apart can wait for ever.
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device to use; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: no such device on this machine.
    """
    there = {"cpu": 1, "cuda": cuda_device_count(), "mps": int(torch.backends.mps.is_available())}
    if device == "auto":
        device = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if device not in there:
        raise UserError(f"unknown device {device!r}; there are auto, {', '.join(there)}")
    if not there[device] or (device == "cuda" and local_rank >= there["cuda"]):
        usable = ", ".join(name for name, count in there.items() if count)
        why = cuda_problem() if device == "cuda" and not there["cuda"] else None
        raise UserError(
            f"torch sees {there[device]} device(s) of kind {device!r} here, too few for process {local_rank} of this "
            f"machine; usable: {usable} (auto takes the best){f'. {why}' if why else ''}"
        )
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)


def training_device(device: str, local_rank: int = 0) -> torch.device:
    """As `choose_device`, but never a processor in place of a GPU that is there and cannot be used.

    Raises:
        UserError: no such device, or a GPU that this torch does not fit.
    """
    chosen = choose_device(device, local_rank)
    why = None
    if device == "auto" and chosen.type == "cpu":
        why = cuda_problem()
    elif chosen.type == "cuda":
        why = gpu_problem(chosen)
    if why:
        raise MachineError(f"{why}. To train on the processor all the same, give --train.device cpu")
    return chosen


def all_reduce_sum(values: Tensor) -> Tensor:
    """The element-wise sum, the same on every rank."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_any(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether any rank says so; every rank gets the same answers."""
    if not dist.is_initialized():
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)


def all_reduce_max(number: int) -> int:
    """The largest of the ranks' numbers, on every rank."""
    if not dist.is_initialized():
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def shared_store() -> dist.Store | None:
    """Keys and values that all ranks share, without a collective; None where there is one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    # A connection of its own: another thread may be waiting on the first.
    return dist.PrefixStore("board", store.clone() if hasattr(store, "clone") else store)


def all_ranks_arrive(place: str, patience_s: float) -> bool:
    """Whether every rank comes to this place, as often as this one, before so many seconds have passed.

    Every rank calls it, but one that is stuck need not come: nothing is waited for in a collective. Only ranks that are
    impatient wait at all; with a patience of 0 a rank says that it is here and goes on.
    """
    store = shared_store()
    if store is None:
        return True
    # How many times each rank was here: a number of its own for each time.
    here, world_size = store.add(f"{place}/{dist.get_rank()}", 1), dist.get_world_size()
    store.set(f"{place}/{dist.get_rank()}/{here}", "here")
    if patience_s:
        try:
            store.wait([f"{place}/{rank}/{here}" for rank in range(world_size)], timedelta(seconds=patience_s))
        except dist.DistStoreError:
            return False
    return True


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_object(value: Any) -> list[Any]:
    """Every rank's value by rank, on rank 0; an empty list elsewhere."""
    if not dist.is_initialized():
        return [value]
    boxes: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, boxes, dst=0)
    return boxes or []


def all_gather_object(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value by rank, on every rank of a group (None: all)."""
    if not dist.is_initialized():
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(boxes, value, group=group)
    return boxes


class RemoteRankError(RuntimeError):
    """Something went wrong on another rank."""


def run_on_all_ranks(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do something on every rank of a group; every rank gets every result, by rank, or an error.

    Raises:
        Exception: what `do` raised on this rank.
        RemoteRankError: it raised on others alone; OSError where one of those was an OSError, UserError likewise.
    """
    result, error = None, None
    try:
        result = do()
    except Exception as raised:
        error = raised
    answers = all_gather_object((result, _told(error)), group)
    if error:
        raise error
    for number, (_, told) in enumerate(answers):
        if told and told[0]:  # an error number
            raise OSError(told[0], f"{told[2]} (on rank {number})")
        if told:
            raise UserError(told[2]) if told[1] else RemoteRankError(f"rank {number}: {told[2]}")
    return [answer for answer, _ in answers]


def _told(error: Exception | None) -> tuple[int | None, bool, str] | None:
    """An error as plain values, since not every exception survives the way to another process."""
    if error is None:
        return None
    number = errno.ENOSPC if out_of_space(error) else getattr(error, "errno", None)
    mine = isinstance(error, UserError)
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return number, mine, text if number or mine else f"{type(error).__name__}: {text}"


def group_rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def is_first(group: dist.ProcessGroup | None) -> bool:
    return group_rank(group) == 0


def new_background_group() -> dist.ProcessGroup | None:
    """A group of all ranks for what goes on beside training, whose messages never meet training's. All ranks call it;
    None where there is one process."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=30)) if dist.is_initialized() else None


def barrier() -> None:
    if dist.is_initialized():
        all_reduce_any(False)  # on gloo: dist.barrier would run on the device
