"""Cross-entropy of the head's predictions, without ever holding all of the logits.

The head is by far the widest matrix of a small model: B T x V float32 logits, their softmax and their gradient would be
most of a step's memory. Here the tokens go through in chunks, and each chunk's gradient is made while its logits are at
hand, so the backward pass only scales it.

Shapes: N tokens (B T of them), D d_model, V padded vocabulary, C tokens of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -1
"""Target of a token that is not predicted."""

# Tokens a chunk, measured in docs/experiments.md: on a CPU its logits stay near the cache, on a GPU its matrix products
# fill the card.
CPU_CHUNK = 256
GPU_CHUNK = 4_096


def mean_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross-entropy in nats of all targets, differentiable in `hidden` and `weight`.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,), each in [0, vocab_size); returns a scalar in float32
    """
    return _MeanLoss.apply(hidden, weight, targets, vocab_size)


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and whether it was the likeliest token. The head runs only where a target is.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,), IGNORED where nothing is asked; returns (N,) float32, 0 where
        ignored, and (N,) bool, false where ignored
    """
    log_probs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    correct = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device)
    for rows in (targets != IGNORED).nonzero().squeeze(1).split(_chunk(hidden)):
        wanted = targets[rows].unsqueeze(1)  # (C, 1)
        logits = _mask_padding((hidden[rows] @ weight.t()).float(), vocab_size)  # (C, V)
        correct[rows] = logits.argmax(dim=-1) == wanted.squeeze(1)
        log_probs[rows] = torch.log_softmax(logits, dim=-1, out=logits).gather(1, wanted).squeeze(1)
    return log_probs, correct


def _chunk(hidden: Tensor) -> int:
    return CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK


def _mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """In place: the vocabulary's padding becomes minus infinity, so it has no probability and no gradient.

    Shapes:
        logits (C, V), returned
    """
    logits[:, vocab_size:] = float("-inf")
    return logits


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        device = hidden.device.type
        # Autocast does not reach inside a Function, so its type is applied by hand.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
        n = targets.shape[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_h, grad_w = torch.empty_like(h), torch.zeros_like(weight)
        # One buffer for every chunk's logits: on a CPU, fresh pages cost as much as the matrix product.
        buffer = torch.empty(min(_chunk(hidden), n), w.shape[0], dtype=dtype, device=hidden.device)
        for start in range(0, n, _chunk(hidden)):
            rows = slice(start, min(start + _chunk(hidden), n))
            wanted = targets[rows].unsqueeze(1)  # (C, 1)
            logits = torch.mm(h[rows], w.t(), out=buffer[: wanted.shape[0]]).float()
            log_probs = torch.log_softmax(_mask_padding(logits, vocab_size), dim=-1, out=logits)  # (C, V)
            loss -= log_probs.gather(1, wanted).sum() / n
            # d loss / d logits = (softmax - onehot) / n
            grad = log_probs.exp_()
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
            grad = grad.mul_(1 / n).to(dtype)
            grad_h[rows] = grad @ w  # (C, D)
            grad_w.addmm_(grad.t(), h[rows]) if dtype == weight.dtype else grad_w.add_(grad.t() @ h[rows])  # (V, D)
        ctx.save_for_backward(grad_h, grad_w)
        ctx.hidden_dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        return (grad_h * grad_loss).to(ctx.hidden_dtype), grad_w * grad_loss, None, None
