"""One optimizer update."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .config import RunConfig
from .data.loader import Loader
from .distributed import Process
from .guard import Guard
from .model import sdpa
from .optim import ScheduledAdamW
from .parallel import clear_gradients, full, last_of_step
from .plan import BatchPlan
from .precision import autocast
from .profiling import unmarked


def train_step(
    runner: nn.Module,
    optimizer: ScheduledAdamW,
    loader: Loader,
    batch: BatchPlan,
    step: int,
    config: RunConfig,
    process: Process,
    guard: Guard,
    phase: Callable[[str], AbstractContextManager[None]] = unmarked,
) -> tuple[Tensor, Tensor, float]:
    """One optimizer update, number `step` counted from 0, unless the guard leaves it out.

    Nothing in it waits for the device.

    Args:
        phase: marks the parts of the step for a profile.

    Returns:
        this rank's mean loss and the gradient norm before clipping, on the device, and the rate.
    """
    loss = accumulate_gradients(runner, loader, batch, config, process, phase)
    with phase("clip"):
        # Of gradients in parts, the norm is that of all parts together.
        grad_norm = full(nn.utils.clip_grad_norm_(optimizer.parameters.values(), config.optim.max_grad_norm))
    with phase("optimizer"):
        rate = optimizer.step(step, skip=guard.judge(grad_norm))
        clear_gradients(runner)
    return loss, grad_norm, rate


def accumulate_gradients(
    runner: nn.Module,
    loader: Loader,
    batch: BatchPlan,
    config: RunConfig,
    process: Process,
    phase: Callable[[str], AbstractContextManager[None]] = unmarked,
) -> Tensor:
    """Leave in every parameter the gradient of the mean loss over the step's tokens, on all ranks together.

    Returns:
        this rank's mean loss, on the device.
    """
    runner.train()
    loss = torch.zeros((), device=process.device)
    for micro_step in range(batch.grad_accum_steps):
        with phase("data"):
            tokens, targets = loader.next()
        with last_of_step(runner, micro_step == batch.grad_accum_steps - 1), sdpa.fastest(process.device):
            with phase("forward"), autocast(config, process.device):
                part = runner(tokens, targets) / batch.grad_accum_steps
            with phase("backward"):
                # A loss that is not finite makes every gradient so: that reaches all ranks, and keeps the update from
                # all.
                part.backward(torch.where(part.detach().isfinite(), 1.0, torch.nan))
        loss += part.detach()
    return loss
