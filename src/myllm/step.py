"""One optimizer update, and the model as it is called for it."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import RunConfig
from .data.loader import Loader
from .distributed import Process
from .guard import Guard
from .model import Transformer
from .optim import ScheduledAdamW
from .plan import BatchPlan


def train_step(
    runner: nn.Module,
    optimizer: ScheduledAdamW,
    loader: Loader,
    batch: BatchPlan,
    step: int,
    config: RunConfig,
    process: Process,
    guard: Guard,
) -> tuple[Tensor, Tensor, float]:
    """One optimizer update, number `step` counted from 0, unless the guard leaves it out.

    Returns:
        this rank's mean loss and the gradient norm before clipping, on the device, and the rate.
    """
    loss = accumulate_gradients(runner, loader, batch, config, process)
    grad_norm = nn.utils.clip_grad_norm_(optimizer.parameters.values(), config.optim.max_grad_norm)
    rate = optimizer.step(step, skip=guard.judge(grad_norm))
    optimizer.zero_grad()
    return loss, grad_norm, rate


def accumulate_gradients(
    runner: nn.Module, loader: Loader, batch: BatchPlan, config: RunConfig, process: Process
) -> Tensor:
    """Leave in every parameter the gradient of the mean loss over the step's tokens, on all ranks together.

    Returns:
        this rank's mean loss, on the device.
    """
    runner.train()
    loss = torch.zeros((), device=process.device)
    for micro_step in range(batch.grad_accum_steps):
        tokens, targets = loader.next()
        last = micro_step == batch.grad_accum_steps - 1
        # Gradients travel between ranks once a step, with the last micro-step's backward pass.
        waiting = runner.no_sync() if isinstance(runner, DistributedDataParallel) and not last else nullcontext()
        with waiting:
            with autocast(config, process.device):
                part = runner(tokens, targets) / batch.grad_accum_steps
            # A loss that is not finite makes every gradient so: that reaches all ranks, and keeps the update from all.
            part.backward(torch.where(part.detach().isfinite(), 1.0, torch.nan))
        loss += part.detach()
    return loss


def wrap(model: Transformer, config: RunConfig, process: Process) -> nn.Module:
    """The model as training calls it: compiled where that pays, with gradients averaged over ranks."""
    runner: nn.Module = model
    if config.train.compile == "on" or (config.train.compile == "auto" and process.device.type == "cuda"):
        runner = torch.compile(model)
    if process.world_size > 1:
        devices = [process.device] if process.device.type == "cuda" else None
        runner = DistributedDataParallel(runner, device_ids=devices, gradient_as_bucket_view=True)
    return runner


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bfloat16 where the config asks for it; weights and optimizer stay float32."""
    wanted = config.train.precision
    bf16 = wanted == "bfloat16" or (wanted == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
