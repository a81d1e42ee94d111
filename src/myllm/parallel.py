"""How a model is spread over the ranks: whole on each (DDP), or a part of every matrix on each (FSDP2).

Both are PyTorch's own. Order matters: `spread` cuts the weights, so it comes before the optimizer; `wrap` gives what a
step calls, and comes after a checkpoint is loaded.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .config import RunConfig
from .distributed import Process
from .model import Transformer
from .precision import autocast, computes_in_bfloat16


def spread(model: Transformer, config: RunConfig, process: Process) -> Transformer:
    """Cut the weights of `model` into one part a rank, where train.parallel asks for that.

    Returns:
        the model that evaluations see: `model` itself, or for FSDP one that has its weights only inside `gathered`.
    """
    if config.train.parallel == "ddp" or process.world_size == 1:
        return model
    whole = copy.deepcopy(model)
    _release(whole)
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    # What travels is rounded to what autocast would round it to anyway, which halves it; sums over ranks are float32.
    # The embedding stays float32, so that the residual stream does too.
    half = torch.bfloat16 if computes_in_bfloat16(config, process.device) else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    return whole


def wrap(model: Transformer, config: RunConfig, process: Process) -> nn.Module:
    """The model as training calls it: compiled where that pays, with gradients averaged over ranks."""
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and process.device.type == "cuda")
    # FSDP's collectives stand between the blocks, and torch's splitter of graphs for DDP refuses checkpointed blocks.
    by_block = isinstance(model, FSDPModule) or config.train.activation_checkpointing
    for block in model.blocks:
        block.recompute = config.train.activation_checkpointing
    # Shapes never change in training. A graph that would break in two is an error, not a slower run.
    options = {"fullgraph": True, "dynamic": False}
    if compiled and by_block:
        model.compile_parts(**options)
    runner: nn.Module = torch.compile(model, **options) if compiled and not by_block else model
    if process.world_size > 1 and not isinstance(model, FSDPModule):
        devices = [process.device] if process.device.type == "cuda" else None
        runner = DistributedDataParallel(runner, devices, gradient_as_bucket_view=True, static_graph=True)
        _show_graph(runner, config, process)
    return runner


def _show_graph(runner: nn.Module, config: RunConfig, process: Process) -> None:
    """Two backward passes over empty text: from the first DDP learns the graph, from the second the order of gradients.

    It cannot learn them from a micro-step whose gradients stay (torch 2.13 fails with an assertion). And were it to
    learn them from real steps, those would be summed in other buckets, and so in another order, than later ones: on
    three ranks or more a restarted run would differ in the last bits.
    """
    shape = config.train.micro_batch_size, config.model.max_seq_len
    tokens = torch.zeros(shape, dtype=torch.int64, device=process.device)
    with torch.random.fork_rng([process.device] if process.device.type == "cuda" else []):
        runner.train()
        for _ in range(2):
            with autocast(config, process.device):
                loss = runner(tokens, tokens)
            loss.backward()
            runner.zero_grad(set_to_none=True)


@contextmanager
def last_of_step(runner: nn.Module, last: bool) -> Iterator[None]:
    """Around one micro-step: gradients travel between ranks with the last one's backward pass alone."""
    if isinstance(runner, DistributedDataParallel) and not last:
        with runner.no_sync():
            yield
    elif isinstance(runner, FSDPModule):
        runner.set_requires_gradient_sync(last)
        yield
    else:
        yield


@contextmanager
def gathered(model: Transformer, whole: Transformer) -> Iterator[None]:
    """Give `whole`, which `spread` returned, the weights of `model`. Every rank takes part, at entry only.

    Inside there is no communication, so ranks may call the model as often as each likes, and one that fails leaves no
    other waiting. It costs the memory of the whole weights, in float32.
    """
    if whole is model:
        yield
        return
    try:
        for mine, part in zip(whole.parameters(), model.parameters(), strict=True):
            mine.data = full(part.detach())
        yield
    finally:
        _release(whole)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may have a part. Every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, cut as `like` is. Every rank takes part, with the same `whole`."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    # Every rank has it all: nothing needs to travel.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _release(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
