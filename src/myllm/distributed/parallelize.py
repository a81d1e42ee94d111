"""DDP (each rank holds the whole model) or FSDP2 (a shard of every matrix); torch.compile, activation checkpointing.

Order matters: `shard` comes before the optimizer, which must see the sharded weights; `parallelize` returns what a
training step calls, and comes after a checkpoint is loaded.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from myllm.config import RunConfig
from myllm.model import attention_backend
from myllm.model.transformer import Block, Transformer

from .collectives import DistContext
from .device_info import has_triton
from .precision import autocast, compute_dtype, deterministic

BUCKET_MB = 64
"""Of gradients per DDP all-reduce. When the model is compiled as a whole, each bucket is a graph of its own, and
torch's 25 MB would split each block of lf-llm-269m, which has 67 MB, in two or three. An all-reduce of 64 MB takes a
few milliseconds of a backward pass of hundreds, and only the last, of the embedding, overlaps with nothing. Reasoned,
not measured (docs/experiments.md)."""


def shard(model: Transformer, config: RunConfig, dist: DistContext) -> Transformer:
    """Shard the weights of `model` over the ranks if train.parallel is fsdp.

    Returns:
        the model for evaluations: `model` itself, or for FSDP a copy that has weights only inside `full_params`.
    """
    if config.train.parallel == "ddp" or dist.world_size == 1:
        return model
    eval_model = copy.deepcopy(model)
    _free_params(eval_model)
    apply_fsdp(model, config, dist)
    return eval_model


def apply_fsdp(model: Transformer, config: RunConfig, dist: DistContext) -> None:
    """FSDP2 on any number of ranks, including one."""
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    # All-gathers use the type that autocast would round to anyway, which halves them; reductions are float32. The
    # embedding stays float32, so that the residual stream begins in it.
    dtype = compute_dtype(config.train.precision, dist.device)
    param_dtype = None if dtype is torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def compile_mode(model: Transformer, config: RunConfig, device: torch.device) -> Literal["", "whole", "block by block"]:
    """What training compiles: nothing, the model and its loss as one graph, or each block and the loss separately."""
    if config.train.compile == "off" or (config.train.compile == "auto" and not has_triton(device)):
        return ""
    # FSDP's collectives run between blocks, and torch's graph splitter for DDP rejects checkpointed blocks.
    needed = isinstance(model, FSDPModule) or config.train.activation_checkpointing
    return "block by block" if needed or config.train.compile_unit == "block" else "whole"


def parallelize(model: Transformer, config: RunConfig, dist: DistContext) -> nn.Module:
    """The model that a training step calls: compiled where that pays, and wrapped in DDP where it is used."""
    mode = compile_mode(model, config, dist.device)
    for block in cast(Iterable[Block], model.blocks):
        block.recompute = config.train.activation_checkpointing
    # Shapes never change in training. A graph break is an error, not a slower run.
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if mode == "block by block":
        model.compile_blocks(**options)
    train_model: nn.Module = cast(nn.Module, torch.compile(model, **options)) if mode == "whole" else model
    if dist.world_size > 1 and not isinstance(model, FSDPModule):
        device_ids = [dist.device] if dist.device.type == "cuda" else None
        train_model = DistributedDataParallel(
            train_model, device_ids, gradient_as_bucket_view=True, static_graph=True, bucket_cap_mb=BUCKET_MB
        )
        # The only buffers are the rotary tables, which are constant and equal on all ranks. The constructor's argument
        # has a new name in torch 2.13, which warns of the old one; the attribute exists in all versions.
        train_model.broadcast_buffers = False
        # torch splits graphs at DDP's buckets. A whole model needs that, to overlap all-reduces with its backward pass;
        # a block would only be split in two or three.
        with torch._dynamo.config.patch(optimize_ddp=False) if mode == "block by block" else nullcontext():
            _trace_ddp(train_model, config, dist)
    return train_model


def _trace_ddp(train_model: nn.Module, config: RunConfig, dist: DistContext) -> None:
    """Run two backward passes: DDP learns the graph from the first, the order of gradients from the second.

    It cannot learn them from a micro-step without synchronization (torch 2.13 fails with an assertion). And if it
    learned them from real steps, these would be reduced in other buckets, and so in another order, than later ones: on
    three ranks or more a restarted run would differ in the last bits.
    """
    size = config.train.micro_batch_size
    assert size != "auto", "a number must be chosen first"
    shape = size, config.model.max_seq_len
    # Two tensors, as in a step: with one, torch would compile for that case, and again at the first batch.
    tokens, targets = (torch.zeros(shape, dtype=torch.int64, device=dist.device) for _ in range(2))
    devices = [dist.device] if dist.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        attention_backend.training_backends(dist.device, config.train),
        deterministic(config.train.deterministic),
    ):
        train_model.train()
        for _ in range(2):
            with autocast(config, dist.device):
                loss = train_model(tokens, targets)
            loss.backward()
            zero_grad(train_model)


@contextmanager
def sync_grads_on_last(train_model: nn.Module, last: bool) -> Iterator[None]:
    """Around one micro-step: only the last one of a step reduces gradients over ranks."""
    if isinstance(train_model, DistributedDataParallel) and not last:
        with train_model.no_sync():
            yield
    elif isinstance(train_model, FSDPModule):
        train_model.set_requires_gradient_sync(last)
        yield
    else:
        yield


def zero_grad(train_model: nn.Module) -> None:
    """Reset the gradients. DDP's are views of its buckets and must be zeroed in place: set to None, the gradients of
    micro-steps without synchronization would need as much memory again."""
    train_model.zero_grad(set_to_none=not isinstance(train_model, DistributedDataParallel))


@contextmanager
def full_params(model: Transformer, eval_model: Transformer) -> Iterator[None]:
    """Give `eval_model`, which `shard` returned, the weights of `model`. Every rank takes part, at entry only.

    Inside there is no communication, so each rank may call the model as often as it likes, and a rank that fails does
    not block the others. It costs the memory of all weights in float32.
    """
    if eval_model is model:
        yield
        return
    try:
        for param, sharded in zip(eval_model.parameters(), model.parameters(), strict=True):
            param.data = full_tensor(sharded.detach())
        yield
    finally:
        _free_params(eval_model)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of `tensor`, placed like `like`. Every rank takes part, with the same tensor."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    # src_data_rank None: every rank has the tensor, so nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _free_params(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
