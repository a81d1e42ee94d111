"""Cross-entropy of the head's predictions, without ever holding all of the logits.

The head is by far the widest matrix of a small model: B T x V float32 logits, their softmax and their gradient would be
most of a step's memory. Here the tokens go through in chunks, and each chunk's gradient is made while its logits are at
hand, so the backward pass only scales it.

Shapes: N tokens (B T of them), D d_model, V padded vocabulary, C tokens of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -1
"""Target of a token that is not predicted."""

# Tokens a chunk. A CPU wants a chunk's logits in its last cache, and no more chunks than that, since each adds to the
# whole gradient of the head (docs/experiments.md); on a GPU the matrix products need enough rows to fill the card,
# and four times as many gain 0.3 % of a step for 1.2 GiB and more (docs/speed.md).
CPU_CHUNK = 128
GPU_CHUNK = 4_096

# By what the logits' gradient is multiplied before the products in float16. Divided by the number of tokens, as in
# other types, most of it would be below float16's least number, 6e-8, and a scale of the loss comes too late to help;
# left as it is, a sum over a chunk's tokens could be above its largest, 65,504.
FLOAT16_GRAD_SCALE = 1 / 16


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross-entropy in nats of all targets, differentiable in `hidden` and `weight`.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,), each in [0, vocab_size); returns a scalar in float32
    """
    return _MeanLoss.apply(hidden, weight, targets, vocab_size)


@torch.no_grad()
def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and whether no token was likelier. The head runs only where a target is.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,), IGNORED where nothing is asked; returns (N,) float32, 0 where
        ignored, and (N,) bool, false where ignored
    """
    scores = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    hits = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device)
    for rows, log_probs in _asked_log_probs(hidden, weight, targets, vocab_size):
        scores[rows] = log_probs.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        hits[rows] = scores[rows] == log_probs.amax(dim=-1)
    return scores, hits


@torch.no_grad()
def token_ranks(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_scores`, with each target's place among all tokens and what the likeliest one is given.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,), IGNORED where nothing is asked; returns (N,) log-probabilities in
        float32, (N,) int64, how many tokens were likelier, and (N,) float32, the probability of the likeliest; all 0
        where ignored
    """
    scores = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    places, confidence = torch.zeros_like(targets), torch.zeros_like(scores)
    for rows, log_probs in _asked_log_probs(hidden, weight, targets, vocab_size):
        wanted = log_probs.gather(1, targets[rows].unsqueeze(1))  # (C, 1)
        scores[rows] = wanted.squeeze(1)
        places[rows] = (log_probs > wanted).sum(dim=-1)
        confidence[rows] = log_probs.amax(dim=-1).exp()
    return scores, places, confidence


def _asked_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Which tokens have a target, (C,), with their log-probabilities, (C, V), in chunks; valid until the next one."""
    asked = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    h, w = _in_compute_type(hidden, weight)
    buffer = _logits_buffer(h, w, len(asked))
    for rows in asked.split(_chunk(hidden)):
        yield rows, _log_probs(h[rows], w, vocab_size, buffer)


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        h, w = _in_compute_type(hidden.detach(), weight.detach())
        compiling = torch.compiler.is_compiling()
        way = _loss_and_gradients_compiled if compiling else _loss_and_gradients_in_place
        loss, grad_h, grad_w = way(h, w, targets, vocab_size, weight.dtype)
        ctx.save_for_backward(grad_h, grad_w)
        ctx.hidden_dtype, ctx.n = hidden.dtype, targets.shape[0]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        if grad_h.dtype is torch.float16:  # only now, with a scaled loss, is there room to divide in
            scaled = grad_h.float() * (grad_loss * (1 / (FLOAT16_GRAD_SCALE * ctx.n)))
        else:
            scaled = grad_h * grad_loss
        return scaled.to(ctx.hidden_dtype), grad_w * grad_loss, None, None


def _loss_and_gradients_in_place(
    h: Tensor, w: Tensor, targets: Tensor, vocab_size: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and its gradients, operation by operation, each in the memory of the one before.

    Shapes:
        h (N, D) and w (V, D), in the type of the products; targets (N,); returns a float32 scalar, (N, D) in that type,
        in float16 times FLOAT16_SHARE N, and (V, D) in `weight_dtype`
    """
    n, small = targets.shape[0], w.dtype is torch.float16
    rest = 1 / (FLOAT16_GRAD_SCALE * n) if small else 1 / n
    loss = torch.zeros((), dtype=torch.float32, device=h.device)
    grad_h, grad_w = torch.empty_like(h), torch.zeros_like(w, dtype=weight_dtype)
    buffer = _logits_buffer(h, w, n)
    for rows in _chunks(h):
        wanted = targets[rows].unsqueeze(1)  # (C, 1)
        logits = _logits(h[rows], w, vocab_size, buffer)  # (C, V)
        # A target's own probability may be too small for a float; that of the likeliest token, plus how far the target
        # is behind, never is.
        behind = logits.gather(1, wanted) - logits.amax(dim=-1, keepdim=True)  # (C, 1)
        probabilities = torch.softmax(logits, dim=-1, out=logits)
        loss -= (behind + probabilities.amax(dim=-1, keepdim=True).log()).sum() / n
        # d loss / d logits = (softmax - onehot) / n, where n can wait until the matrices are small.
        probabilities.scatter_add_(1, wanted, probabilities.new_full(wanted.shape, -1.0))
        grad = (probabilities.mul_(FLOAT16_GRAD_SCALE) if small else probabilities).to(w.dtype)
        _product(grad, w, grad_h[rows])  # (C, D)
        if not small:
            grad_h[rows].div_(n)
        if w.dtype == weight_dtype:
            grad_w.addmm_(grad.t(), h[rows], alpha=rest)  # (V, D), with no second matrix of that size
        else:
            grad_w.add_(grad.t() @ h[rows], alpha=rest)  # (V, D)
    return loss, grad_h, grad_w


def _loss_and_gradients_compiled(
    h: Tensor, w: Tensor, targets: Tensor, vocab_size: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_loss_and_gradients_in_place`, in the form that a compiler fuses.

    Between the matrix products stand only reductions over a row and operations on single elements, so a chunk is read
    from its logits, in the type of the products, and written as their gradient, in that type: float32 is in registers
    alone. Buffers, and a one-hot vector that is scattered, would each be a tensor of a chunk's size in memory.
    """
    n, columns = targets.shape[0], torch.arange(w.shape[0], device=h.device)  # (V,)
    small = w.dtype is torch.float16
    divisor = 1 / FLOAT16_GRAD_SCALE if small else n
    loss = torch.zeros((), dtype=torch.float32, device=h.device)
    grad_h, grad_w = [], torch.zeros_like(w, dtype=weight_dtype)
    for rows in _chunks(h):
        wanted = targets[rows].unsqueeze(1)  # (C, 1)
        logits = (h[rows] @ w.t()).float()  # (C, V)
        if vocab_size < w.shape[0]:  # the vocabulary's padding has no probability, and no gradient
            logits = torch.where(columns < vocab_size, logits, float("-inf"))
        total = logits.logsumexp(dim=-1, keepdim=True)  # (C, 1)
        onehot = columns == wanted  # (C, V)
        loss = loss + (total - torch.where(onehot, logits, 0.0).sum(dim=-1, keepdim=True)).sum() / n
        grad = (((logits - total).exp() - onehot.float()) / divisor).to(w.dtype)  # (C, V)
        grad_h.append(grad @ w)  # (C, D)
        part = grad.t() @ h[rows]  # (V, D)
        grad_w = grad_w + (part.to(weight_dtype) * (divisor / n) if small else part)
    return loss, torch.cat(grad_h), grad_w


def _log_probs(h: Tensor, w: Tensor, vocab_size: int, buffer: Tensor) -> Tensor:
    """Log-probabilities in float32, in the buffer's memory where its type allows; see `_logits`."""
    logits = _logits(h, w, vocab_size, buffer)
    return torch.log_softmax(logits, dim=-1, out=logits)


def _logits(h: Tensor, w: Tensor, vocab_size: int, buffer: Tensor) -> Tensor:
    """Logits in float32, in the buffer's memory where its type allows.

    The vocabulary's padding gets minus infinity: no probability, and no gradient.

    Shapes:
        h (C, D); w (V, D); buffer (C or more, V); returns (C, V)
    """
    logits = _product(h, w.t(), buffer[: h.shape[0]]).float()
    logits[:, vocab_size:] = float("-inf")
    return logits


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the memory of `out`, which may be a part of a tensor."""
    return torch.mm(a, b, out=out) if _writes_parts(out.device) else out.copy_(a @ b)


def _writes_parts(device: torch.device) -> bool:
    """Whether a product can be written into a part of a tensor: on macOS 14, MPS leaves the part as it was, and says
    nothing (pytorch/pytorch#193385)."""
    return device.type != "mps"


def _logits_buffer(h: Tensor, w: Tensor, n: int) -> Tensor:
    """Room for one chunk's logits, used again for each: on a CPU, fresh pages cost as much as the matrix product."""
    return torch.empty(min(_chunk(h), n), w.shape[0], dtype=h.dtype, device=h.device)


def _in_compute_type(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's type, applied by hand: autocast reaches neither into a Function nor to products with `out`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def _chunks(hidden: Tensor) -> list[slice]:
    """Rows of each chunk; no row twice, and none for no tokens."""
    n, size = hidden.shape[0], _chunk(hidden)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _chunk(hidden: Tensor) -> int:
    return CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
