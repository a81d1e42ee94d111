"""One optimizer update."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from myllm.config import RunConfig
from myllm.data.dataloader import BatchLoader
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import full_tensor, sync_grads_on_last, zero_grad
from myllm.distributed.precision import autocast, deterministic
from myllm.model.attention_backend import training_backends
from myllm.optim.adamw import ScheduledAdamW
from myllm.planning.batch import BatchPlan

from .gradient_guard import GradientGuard
from .profiler import no_phase


def train_step(
    runner: nn.Module,
    optimizer: ScheduledAdamW,
    loader: BatchLoader,
    batch: BatchPlan,
    step: int,
    config: RunConfig,
    process: DistContext,
    guard: GradientGuard,
    phase: Callable[[str], AbstractContextManager[None]] = no_phase,
) -> tuple[Tensor, Tensor, float]:
    """One optimizer update, number `step` counted from 0, unless the guard leaves it out.

    Nothing in it waits for the device.

    Args:
        phase: marks the parts of the step for a profile.

    Returns:
        this rank's mean loss and the gradient norm before clipping, on the device, and the rate.
    """
    loss_scale = guard.loss_scale
    with deterministic(config.train.deterministic):
        loss = accumulate_gradients(runner, loader, batch, config, process, phase, loss_scale)
        with phase("clip"):
            grad_norm = clip_gradients(optimizer.parameters.values(), config.optim.max_grad_norm, loss_scale)
        with phase("optimizer"):
            rate = optimizer.step(step, guard.check(grad_norm), loss_scale)
            zero_grad(runner)
    return loss, grad_norm, rate


def clip_gradients(parameters: Collection[nn.Parameter], max_norm: float, loss_scale: Tensor | None = None) -> Tensor:
    """Make gradients shorter whose norm, without the loss scale, is above `max_norm`. They keep the scale.

    Returns:
        the norm before, without the scale; of gradients in parts, that of all parts together.
    """
    if loss_scale is None:
        return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))
    norm = (
        full_tensor(nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])) / loss_scale
    )
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def accumulate_gradients(
    runner: nn.Module,
    loader: BatchLoader,
    batch: BatchPlan,
    config: RunConfig,
    process: DistContext,
    phase: Callable[[str], AbstractContextManager[None]] = no_phase,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """Leave in every parameter the gradient of the mean loss over the step's tokens, on all ranks together.

    Args:
        loss_scale: what that gradient is multiplied by; None: nothing.

    Returns:
        this rank's mean loss, on the device.
    """
    runner.train()
    loss = torch.zeros((), device=process.device)
    scale = 1.0 if loss_scale is None else loss_scale
    for micro_step in range(batch.grad_accum_steps):
        with phase("data"):
            tokens, targets = loader.next_batch()
        last = micro_step == batch.grad_accum_steps - 1
        with sync_grads_on_last(runner, last), training_backends(process.device, config.train):
            with phase("forward"), autocast(config, process.device):
                part = runner(tokens, targets) / batch.grad_accum_steps
            with phase("backward"):
                # A loss that is not finite makes every gradient so: that reaches all ranks, and keeps the update from
                # all.
                part.backward(torch.where(part.detach().isfinite(), scale, torch.nan))
        loss += part.detach()
    return loss
