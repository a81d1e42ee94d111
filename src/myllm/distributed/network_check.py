"""All-reduces with known sums between the ranks of a run: are they right, and how fast do they go?"""

import platform
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from myllm.errors import UserError

from . import launcher as ranks
from .collectives import choose_device
from .device_info import device_name

SIZES_BYTES = (4 << 10, 1 << 20, 25 << 20, 100 << 20)
"""Of what is timed: a norm or a flag, a small matrix, one of DDP's buckets, the gradient of an embedding."""
EACH_S = 0.5
"""Spent on one size, about."""


def check_network(device: str, timeout_s: float) -> Iterator[str]:
    """Lines for people, from rank 0; the other ranks give none.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout_s: how long each rank waits for the others, at the start and in each all-reduce.

    Raises:
        UserError: ranks that did not come, or a sum that is wrong.
    """
    rank, world_size = ranks.rank(), ranks.world_size() if ranks.is_launched() else 1
    chosen = choose_device(device, ranks.local_rank())
    timeout = timedelta(seconds=timeout_s)
    store = _store(rank, world_size, timeout)
    named = f"rank {rank}: {platform.node()}, local rank {ranks.local_rank()}, {chosen} ({device_name(chosen)})"
    present = _present(store, rank, world_size, named, timeout_s)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        said = [*present, *_measure(chosen, rank, world_size)]
    except RuntimeError as error:
        raise UserError(
            f"an all-reduce between {world_size} ranks failed or took over {timeout_s:g} s: {error}"
        ) from None
    finally:
        dist.destroy_process_group()
    if rank == 0:
        yield from said


def _store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    if world_size == 1:
        return dist.HashStore()
    host, port, mine = ranks.store_address()
    try:
        return dist.TCPStore(host, port, is_master=mine, timeout=timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(
            f"rank {rank} on {platform.node()} does not reach rank 0's machine, {host} port {port}: is it running "
            f"there, and is the port open? ({error})"
        ) from None


def _present(store: dist.Store, rank: int, world_size: int, named: str, timeout_s: float) -> list[str]:
    """Who is there, by rank, once all are."""
    store.set(f"here/{rank}", named)
    deadline = time.monotonic() + timeout_s
    waiting = list(range(world_size))
    while waiting := [each for each in waiting if not store.check([f"here/{each}"])]:
        if time.monotonic() > deadline:
            there = [store.get(f"here/{each}").decode() for each in range(world_size) if each not in waiting]
            raise UserError(
                f"of {world_size} ranks, {', '.join(map(str, waiting))} did not come within {timeout_s:g} s; look at "
                "their machines and at the network to this one. Those that are here:\n  " + "\n  ".join(there)
            )
        time.sleep(0.05)
    return [store.get(f"here/{each}").decode() for each in range(world_size)]


def _measure(device: torch.device, rank: int, world_size: int) -> Iterator[str]:
    """Every rank goes through it; each size is checked before it is timed."""
    yield f"{'message':>10}  {'time':>12}  {'bus':>12}   (all-reduce; bus: what each link carries, both ways)"
    for size in SIZES_BYTES:
        places = torch.arange(size // 4, device=device) % 251
        values = (places + rank + 1).float()
        dist.all_reduce(values)
        expected = (places * world_size + world_size * (world_size + 1) // 2).float()
        wrong = (values != expected).sum().cpu()
        votes = torch.zeros(world_size, dtype=torch.int64)
        votes[rank] = wrong
        dist.all_reduce(votes)
        if votes.any():
            found = ", ".join(f"{int(n):,} on rank {i}" for i, n in enumerate(votes) if n)
            raise UserError(f"all-reduce of {size:,} bytes gave wrong sums: {found}. Training would go wrong silently")
        seconds = _time(values, device)
        carried = 2 * (world_size - 1) / world_size * size / seconds
        shown = f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
        yield f"{shown:>10}  {seconds * 1e3:>9.3f} ms  {carried / 1e9:>7.2f} GB/s"
    yield f"the sums are right on all {world_size} ranks" if world_size > 1 else "one rank: nothing had to travel"


def _time(values: torch.Tensor, device: torch.device) -> float:
    """Seconds of one all-reduce, on the slowest rank."""
    repeats = 1
    while True:
        values.zero_()
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(values)
        _wait(device)
        elapsed = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)  # every rank decides alike
        if elapsed > EACH_S / 4 or repeats >= 256:
            return float(elapsed) / repeats
        repeats *= 4


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
