"""How a model is spread over the ranks: whole on each (DDP), or a part of every matrix on each (FSDP2).

Both are PyTorch's own. Order matters: `spread` cuts the weights, so it comes before the optimizer; `wrap` gives what a
step calls, and comes after a checkpoint is loaded.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from myllm.config import RunConfig
from myllm.model import attention_backend as sdpa
from myllm.model.transformer import Transformer

from .collectives import DistContext
from .device_info import has_triton
from .precision import autocast, compute_dtype, deterministic

BUCKET_MB = 64
"""Of gradients that DDP sums at a time, from the last layers to the first. Each bucket is a graph of its own where the
model is compiled as a whole, and torch's 25 MB would cut each block of lf-llm-269m, which has 67 MB, in two or three.
A sum of 64 MB takes a few milliseconds of a backward pass of hundreds, and only the last, the embedding's, has nothing
to run beside. Reasoned, not measured (docs/experiments.md)."""


def shard(model: Transformer, config: RunConfig, process: DistContext) -> Transformer:
    """Cut the weights of `model` into one part a rank, where train.parallel asks for that.

    Returns:
        the model that evaluations see: `model` itself, or for FSDP one that has its weights only inside `gathered`.
    """
    if config.train.parallel == "ddp" or process.world_size == 1:
        return model
    whole = copy.deepcopy(model)
    _release(whole)
    apply_fsdp(model, config, process)
    return whole


def apply_fsdp(model: Transformer, config: RunConfig, process: DistContext) -> None:
    """Leave each rank a part of every matrix: FSDP2, on any number of ranks, one included."""
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    # What travels is rounded to what autocast would round it to anyway, which halves it; sums over ranks are float32.
    # The embedding stays float32, so that the residual stream begins in it.
    dtype = compute_dtype(config.train.precision, process.device)
    half = None if dtype is torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def compile_mode(model: Transformer, config: RunConfig, device: torch.device) -> Literal["", "whole", "block by block"]:
    """What is compiled in training: nothing, the model and its loss as one graph, or blocks and the loss apart."""
    if config.train.compile == "off" or (config.train.compile == "auto" and not has_triton(device)):
        return ""
    # FSDP's collectives stand between the blocks, and torch's splitter of graphs for DDP refuses checkpointed blocks.
    needed = isinstance(model, FSDPModule) or config.train.activation_checkpointing
    by_block = needed or config.train.compile_unit == "block"
    return "block by block" if by_block else "whole"


def parallelize(model: Transformer, config: RunConfig, process: DistContext) -> nn.Module:
    """The model as training calls it: compiled where that pays, with gradients averaged over ranks."""
    compiled = compile_mode(model, config, process.device)
    for block in model.blocks:
        block.recompute = config.train.activation_checkpointing
    # Shapes never change in training. A graph that would break in two is an error, not a slower run.
    options = {"fullgraph": True, "dynamic": False}
    if compiled == "block by block":
        model.compile_blocks(**options)
    runner: nn.Module = torch.compile(model, **options) if compiled == "whole" else model
    if process.world_size > 1 and not isinstance(model, FSDPModule):
        devices = [process.device] if process.device.type == "cuda" else None
        runner = DistributedDataParallel(
            runner, devices, gradient_as_bucket_view=True, static_graph=True, bucket_cap_mb=BUCKET_MB
        )
        # The only buffers are the rotary tables, which every rank makes alike and no step changes. torch 2.13 has a new
        # name for the constructor's argument and warns of the old one; the attribute is there in all versions.
        runner.broadcast_buffers = False
        with _uncut() if compiled == "block by block" else nullcontext():
            _show_graph(runner, config, process)
    return runner


def _uncut() -> AbstractContextManager[None]:
    """Keep torch from cutting graphs at DDP's buckets. It does so to every graph that is compiled inside DDP, and a
    whole model needs it, for gradients to travel beside its backward pass; a block would be cut in two or three."""
    from torch._dynamo import config

    return config.patch(optimize_ddp=False)


def _show_graph(runner: nn.Module, config: RunConfig, process: DistContext) -> None:
    """Two backward passes over empty text: from the first DDP learns the graph, from the second the order of gradients.

    It cannot learn them from a micro-step whose gradients stay (torch 2.13 fails with an assertion). And were it to
    learn them from real steps, those would be summed in other buckets, and so in another order, than later ones: on
    three ranks or more a restarted run would differ in the last bits.
    """
    shape = config.train.micro_batch_size, config.model.max_seq_len
    # Two tensors, as in a step: were they one, the graph would be compiled for that case alone, and the first batch
    # would have it compiled once more.
    tokens, targets = (torch.zeros(shape, dtype=torch.int64, device=process.device) for _ in range(2))
    cards = [process.device] if process.device.type == "cuda" else []
    repeats = deterministic(config.train.deterministic)
    with torch.random.fork_rng(cards), sdpa.training_backends(process.device, config.train), repeats:
        runner.train()
        for _ in range(2):
            with autocast(config, process.device):
                loss = runner(tokens, targets)
            loss.backward()
            zero_grad(runner)


@contextmanager
def sync_grads_on_last(runner: nn.Module, last: bool) -> Iterator[None]:
    """Around one micro-step: gradients travel between ranks with the last one's backward pass alone."""
    if isinstance(runner, DistributedDataParallel) and not last:
        with runner.no_sync():
            yield
    elif isinstance(runner, FSDPModule):
        runner.set_requires_gradient_sync(last)
        yield
    else:
        yield


def zero_grad(runner: nn.Module) -> None:
    """Make ready for the next step's gradients.

    DDP's are views of its buckets, and stay so if they become zero in place. Set to None, those of micro-steps that do
    not travel would lie in memory of their own, as much again as the buckets.
    """
    runner.zero_grad(set_to_none=not isinstance(runner, DistributedDataParallel))


@contextmanager
def full_params(model: Transformer, whole: Transformer) -> Iterator[None]:
    """Give `whole`, which `spread` returned, the weights of `model`. Every rank takes part, at entry only.

    Inside there is no communication, so ranks may call the model as often as each likes, and one that fails leaves no
    other waiting. It costs the memory of the whole weights, in float32.
    """
    if whole is model:
        yield
        return
    try:
        for mine, part in zip(whole.parameters(), model.parameters(), strict=True):
            mine.data = full_tensor(part.detach())
        yield
    finally:
        _release(whole)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may have a part. Every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, cut as `like` is. Every rank takes part, with the same `whole`."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    # Every rank has it all: nothing needs to travel.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _release(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
