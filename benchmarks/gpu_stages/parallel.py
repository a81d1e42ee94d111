"""NCCL on one card, in a group of one rank: DDP and FSDP2 against the plain model, and what they cost."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from myllm.config import RunConfig
from myllm.distributed.parallelize import apply_fsdp, full_tensor, zero_grad
from myllm.model.transformer import Transformer
from myllm.planning.batch import batch_plan
from myllm.planning.memory_estimate import ComputeMode, predicted_bytes
from myllm.training.kernels import fast_kernels
from myllm.training.preflight.device_memory import peak_bytes
from myllm.training.step import accumulate_gradients

from .bench import NO_DROPOUT, Bench, fresh, graphs, relative_error, seconds_of
from .correct import OneBatch, tokens_and_targets
from .frame import Check, bounded, close, correct, noted

LAYERS = 4
GRADIENT_ERROR = 2e-2
"""Of all gradients together: other partitions of the model fuse, and so round, elsewhere."""
LOSS_ERROR = 1e-3
MOST_SECONDS, MOST_MEMORY = 1.1, 1.1
"""As multiples of the plain model's time and of the predicted peak."""
COLLECTIVES = ("broadcast", "reduce_scatter", "allreduce", "all_reduce", "allgather", "all_gather")


@dataclass(frozen=True)
class Found:
    """What one way gave, after a warm step."""

    loss: float
    gradients: Tensor
    """All of them, one after the other, on the CPU."""
    graphs: tuple[int, int]
    """After the first step, and after those that were timed."""
    seconds: float
    peak_bytes: int
    collectives: dict[str, int]
    """Of a step, by kind."""


def run(bench: Bench) -> Iterator[Check]:
    base = bench.config(LAYERS, micro_batch=2 if bench.tiny else 8)
    config = replace(base, model=replace(base.model, **NO_DROPOUT))
    with group_of_one(bench):
        plain = measured(bench, config, "plain")
        yield noted("plain", f"{plain.seconds * 1e3:,.1f} ms a step, peak {plain.peak_bytes / 2**30:.2f} GiB")
        for name in ("DDP", "FSDP2"):
            yield from compared(bench, config, name, measured(bench, config, name), plain)


@contextmanager
def group_of_one(bench: Bench) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if bench.on_cuda else "gloo"
    device = bench.device if bench.on_cuda else None
    for library in ("GLOO", "NCCL"):  # one rank needs no network, and a machine may have none
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measured(bench: Bench, config: RunConfig, name: str) -> Found:
    """Loss and gradients of one batch by the functions that training calls."""
    fresh(bench.device)
    batch = tokens_and_targets(config.model, bench.device, config.train.micro_batch_size)
    # More than one rank is what makes `fast_kernels` take DDP; FSDP2 is made by `cut`, on the one that there is.
    process = replace(bench.process, world_size=2 if name == "DDP" else 1)
    model = Transformer(config.model, config.train.seed).to(bench.device)
    if name == "FSDP2":
        apply_fsdp(model, config, process)
    steps = batch_plan(config, 1)
    with fast_kernels(model, config, process) as runner:

        def step() -> Tensor:
            zero_grad(runner)
            return accumulate_gradients(runner, OneBatch(batch), steps, config, process.device)

        step()
        first = graphs()
        seconds = seconds_of(bench.device, step, 2 if bench.tiny else 5)
        peak = peak_bytes(bench.device)
        counts = collectives(step)
        loss = step().item()
        gradients = torch.cat([full_tensor(parameter.grad).flatten().cpu() for parameter in model.parameters()])
    return Found(loss, gradients, (first, graphs()), seconds, peak, counts)


def collectives(step: object) -> dict[str, int]:
    """Of one step, by kind, as the backends mark them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recording:
        step()
    counts: dict[str, int] = {}
    for event in recording.key_averages():
        name = event.key.lower()
        kind = next((kind for kind in COLLECTIVES if kind in name), None)
        if kind and name.startswith("c10d::"):
            counts[name.removeprefix("c10d::").rstrip("_")] = event.count
    return counts


def compared(bench: Bench, config: RunConfig, name: str, found: Found, plain: Found) -> Iterator[Check]:
    yield close(f"{name}, loss", abs(found.loss - plain.loss) / plain.loss, LOSS_ERROR)
    yield close(f"{name}, gradients", relative_error(found.gradients, plain.gradients), GRADIENT_ERROR)
    first, last = found.graphs
    yield correct(f"{name}, graphs", first == last, f"{first} at the start, {last} after more steps", "no more")
    sent = ", ".join(f"{count} {kind}" for kind, count in found.collectives.items()) or "none"
    yield correct(f"{name}, collectives of a step", "broadcast" not in found.collectives, sent, "no broadcast")
    ratio = found.seconds / plain.seconds
    yield bounded(f"{name}, time", ratio, None, MOST_SECONDS if bench.on_cuda else None, "of the plain step's", 2)
    how = ComputeMode.of(config, bench.device.type, 2 if name == "DDP" else 1)
    predicted = predicted_bytes(config, replace(how, sharded=name == "FSDP2")) / 2**30
    limit = MOST_MEMORY * predicted if bench.on_cuda else None
    yield bounded(f"{name}, peak memory", found.peak_bytes / 2**30, None, limit, "GiB", 2, predicted=predicted)
