"""All-reduces with known sums between the ranks of a run: correctness and speed."""

import platform
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from myllm.errors import UserError

from . import launcher
from .collectives import choose_device
from .device_info import device_name, time_on_device

SIZES_BYTES = (4 << 10, 1 << 20, 25 << 20, 100 << 20)
"""A norm or a flag, a small matrix, a DDP bucket, the gradient of an embedding."""
SECONDS_PER_SIZE = 0.5


def check_network(device: str, timeout_s: float) -> Iterator[str]:
    """A report, line by line, on rank 0; nothing on the other ranks.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout_s: how long each rank waits for the others, at the start and in each all-reduce.

    Raises:
        UserError: a rank is missing, or a sum is wrong.
    """
    rank, world_size = launcher.rank(), launcher.world_size() if launcher.is_launched() else 1
    chosen = choose_device(device, launcher.local_rank())
    timeout = timedelta(seconds=timeout_s)
    store = _connect(rank, world_size, timeout)
    name = f"rank {rank}: {platform.node()}, local rank {launcher.local_rank()}, {chosen} ({device_name(chosen)})"
    lines = _wait_for_ranks(store, rank, world_size, name, timeout_s)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        lines += _measure(chosen, rank, world_size)
    except RuntimeError as error:
        raise UserError(
            f"an all-reduce between {world_size} ranks failed or took over {timeout_s:g} s: {error}"
        ) from None
    finally:
        dist.destroy_process_group()
    if rank == 0:
        yield from lines


def _connect(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    if world_size == 1:
        return dist.HashStore()
    host, port, is_host = launcher.store_address()
    try:
        return dist.TCPStore(host, port, is_master=is_host, timeout=timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(
            f"rank {rank} on {platform.node()} cannot connect to rank 0's machine, {host} port {port}: check that it "
            f"is running there and that the port is open ({error})"
        ) from None


def _wait_for_ranks(store: dist.Store, rank: int, world_size: int, name: str, timeout_s: float) -> list[str]:
    """The names of all ranks, by rank."""
    store.set(f"here/{rank}", name)
    deadline = time.monotonic() + timeout_s
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        if time.monotonic() > deadline:
            present = [store.get(f"here/{rank}").decode() for rank in range(world_size) if rank not in missing]
            raise UserError(
                f"{len(missing)} of {world_size} ranks did not connect within {timeout_s:g} s: "
                f"{', '.join(map(str, missing))}; check their machines and the network. Connected:\n  "
                + "\n  ".join(present)
            )
        time.sleep(0.05)
    return [store.get(f"here/{rank}").decode() for rank in range(world_size)]


def _measure(device: torch.device, rank: int, world_size: int) -> Iterator[str]:
    """Called by every rank. Each size is verified before it is timed."""
    yield f"{'message':>10}  {'time':>12}  {'bus':>12}   (all-reduce; bus: traffic per link, both directions)"
    for size in SIZES_BYTES:
        offsets = torch.arange(size // 4, device=device) % 251
        values = (offsets + rank + 1).float()
        dist.all_reduce(values)
        expected = (offsets * world_size + world_size * (world_size + 1) // 2).float()
        wrong = torch.zeros(world_size, dtype=torch.int64)
        wrong[rank] = (values != expected).sum().cpu()
        dist.all_reduce(wrong)
        if wrong.any():
            found = ", ".join(f"{int(n):,} on rank {i}" for i, n in enumerate(wrong) if n)
            raise UserError(
                f"an all-reduce of {size:,} bytes gave wrong sums: {found}. Training would silently go wrong"
            )
        seconds = _time_all_reduce(values, device)
        traffic = 2 * (world_size - 1) / world_size * size / seconds
        shown = f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
        yield f"{shown:>10}  {seconds * 1e3:>9.3f} ms  {traffic / 1e9:>7.2f} GB/s"
    yield f"the sums are correct on all {world_size} ranks" if world_size > 1 else "one rank: no network traffic"


def _time_all_reduce(values: torch.Tensor, device: torch.device) -> float:
    """Seconds of one all-reduce, on the slowest rank."""
    repeats = 1

    def all_reduces() -> None:
        for _ in range(repeats):
            dist.all_reduce(values)

    while True:
        values.zero_()
        elapsed = torch.tensor(time_on_device(all_reduces, device), dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)  # so that all ranks repeat equally often
        if elapsed > SECONDS_PER_SIZE / 4 or repeats >= 256:
            return float(elapsed) / repeats
        repeats *= 4
