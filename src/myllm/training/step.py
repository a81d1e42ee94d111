"""One optimizer update: gradients are accumulated over micro-steps, clipped, and applied."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from myllm.config import RunConfig
from myllm.data.dataloader import BatchLoader
from myllm.distributed.parallelize import full_tensor, sync_grads_on_last, zero_grad
from myllm.distributed.precision import autocast, deterministic
from myllm.model import attention_backend as sdpa
from myllm.planning.batch import BatchPlan

from .setup import Trainer

Phase = Callable[[str], AbstractContextManager[object]]


def train_step(trainer: Trainer, step: int, phase: Phase = nullcontext) -> tuple[Tensor, Tensor, float]:
    """Update the weights once, unless the guard skips the update. Never waits for the device.

    Args:
        step: updates before this one.
        phase: marks the parts of the step for the profiler.

    Returns:
        this rank's mean loss and the gradient norm before clipping, both on the device, and the learning rate.
    """
    config, model, optimizer, guard = trainer.ctx.config, trainer.train_model, trainer.optimizer, trainer.guard
    device, loss_scale = trainer.ctx.dist.device, guard.loss_scale
    with deterministic(config.train.deterministic):
        loss = accumulate_gradients(model, trainer.loader, trainer.batch, config, device, loss_scale, phase)
        with phase("clip"):
            grad_norm = clip_gradients(optimizer.parameters.values(), config.optim.max_grad_norm, loss_scale)
        with phase("optimizer"):
            lr = optimizer.step(step, guard.check(grad_norm), loss_scale)
            zero_grad(model)
    return loss, grad_norm, lr


def clip_gradients(parameters: Collection[nn.Parameter], max_norm: float, loss_scale: Tensor | None = None) -> Tensor:
    """Scale the gradients down if their norm, without the loss scale, exceeds `max_norm`. They keep the loss scale.

    Returns:
        the norm before clipping, without the loss scale; for sharded gradients, the norm over all shards.
    """
    if loss_scale is None:
        return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = full_tensor(nn.utils.get_total_norm(gradients)) / loss_scale
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def accumulate_gradients(
    train_model: nn.Module,
    loader: BatchLoader,
    batch: BatchPlan,
    config: RunConfig,
    device: torch.device,
    loss_scale: Tensor | None = None,
    phase: Phase = nullcontext,
) -> Tensor:
    """Set every parameter's gradient to that of the mean loss over the step's tokens on all ranks, times `loss_scale`.

    Returns:
        this rank's mean loss, on the device.
    """
    train_model.train()
    loss = torch.zeros((), device=device)
    scale = 1.0 if loss_scale is None else loss_scale
    for micro_step in range(batch.grad_accum_steps):
        with phase("data"):
            tokens, targets = loader.next_batch()
        is_last = micro_step == batch.grad_accum_steps - 1
        with sync_grads_on_last(train_model, is_last), sdpa.training_backends(device, config.train):
            with phase("forward"), autocast(config, device):
                micro_loss = train_model(tokens, targets) / batch.grad_accum_steps
            with phase("backward"):
                # A loss that is not finite makes every gradient NaN, so that all ranks see it and skip the update.
                micro_loss.backward(torch.where(micro_loss.detach().isfinite(), scale, torch.nan))
        loss += micro_loss.detach()
    return loss
