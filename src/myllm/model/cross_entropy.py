"""Cross-entropy of the head's predictions, without holding all of the logits.

The head is by far the widest matrix of a small model: B T x V float32 logits, their softmax and their gradient would be
most of a step's memory. Here tokens are processed in chunks, and the gradient of a chunk is computed while its logits
are in memory, so that the backward pass only scales it.

Shapes: N tokens (B T of them), D d_model, V padded vocabulary, C tokens in a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -1
"""Target of a token that is not predicted."""

# Tokens in a chunk. On a CPU, the logits of a chunk should fit in the last-level cache, and each further chunk adds to
# the whole gradient of the head once more (docs/experiments.md). On a GPU, the matrix products need enough rows to fill
# the card; four times as many gain 0.3 % of a step for 1.2 GiB and more (docs/speed.md).
CPU_CHUNK = 128
GPU_CHUNK = 4_096
MPS_TERMS = 16_384
"""Terms of a sum in a matrix product on MPS; longer sums, as over the vocabulary, are made of several."""

# Factor on the gradient of the logits before the products in float16. If it were divided by the number of tokens, as in
# other types, most of it would be below float16's smallest number, 6e-8, and a loss scale comes too late to help. If it
# were not scaled, a sum over the tokens of a chunk could exceed float16's largest number, 65,504.
FLOAT16_GRAD_SCALE = 1 / 16


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats: the mean over the targets, and the loss of each target. Only the mean is differentiable.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,), each in [0, vocab_size); returns a scalar and (N,) in float32
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size)


@torch.no_grad()
def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Log-probability of each target. Targets equal to IGNORE_INDEX are ignored: the head is not applied there.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,); returns (N,) float32, 0 where ignored
    """
    scores = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    for rows, log_probs in _log_probs_in_chunks(hidden, weight, targets, vocab_size):
        scores[rows] = log_probs.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
    return scores


@torch.no_grad()
def token_ranks(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`token_log_probs`, the rank of each target among all tokens, and the probability of the most likely token.

    Shapes:
        hidden (N, D); weight (V, D); targets (N,); returns (N,) float32, (N,) int64, the number of more likely tokens,
        and (N,) float32; 0 where ignored
    """
    scores = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    ranks, confidence = torch.zeros_like(targets), torch.zeros_like(scores)
    for rows, log_probs in _log_probs_in_chunks(hidden, weight, targets, vocab_size):
        of_targets = log_probs.gather(1, targets[rows].unsqueeze(1))  # (C, 1)
        scores[rows] = of_targets.squeeze(1)
        confidence[rows] = log_probs.amax(dim=-1).exp()
        # In place: a sum of booleans would first copy them into 64-bit numbers. In float32 it is exact up to 2**24.
        ranks[rows] = log_probs.gt_(of_targets).sum(dim=-1).long()
    return scores, ranks, confidence


def _log_probs_in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of tokens with a target: indices, (C,), and log-probabilities, (C, V) float32 in memory that is reused."""
    with_target = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    h, w = _to_compute_dtype(hidden, weight)
    buffer = _logits_buffer(h, w, len(with_target))
    for rows in with_target.split(_chunk_size(hidden)):
        logits = _logits(h[rows], w, vocab_size, buffer)
        yield rows, torch.log_softmax(logits, dim=-1, out=logits)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        h, w = _to_compute_dtype(hidden.detach(), weight.detach())
        compiling = torch.compiler.is_compiling()
        compute = _losses_and_gradients_compiled if compiling else _losses_and_gradients_in_place
        losses, grad_h, grad_w = compute(h, w, targets, vocab_size, weight.dtype)
        ctx.save_for_backward(grad_h, grad_w)
        ctx.mark_non_differentiable(losses)
        ctx.hidden_dtype, ctx.n = hidden.dtype, targets.shape[0]
        return losses.mean(), losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        if grad_h.dtype is torch.float16:  # can be divided by N only here, where the loss is scaled
            scaled = grad_h.float() * (grad_loss * (1 / (FLOAT16_GRAD_SCALE * ctx.n)))
        else:
            scaled = grad_h * grad_loss
        return scaled.to(ctx.hidden_dtype), grad_w * grad_loss, None, None


def _losses_and_gradients_in_place(
    h: Tensor, w: Tensor, targets: Tensor, vocab_size: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses and the gradients of their mean, where each operation reuses the memory of the one before.

    Shapes:
        h (N, D) and w (V, D), in the compute dtype; targets (N,); returns (N,) float32, (N, D) in the compute dtype
        (in float16, FLOAT16_GRAD_SCALE N times the gradient), and (V, D) in `weight_dtype`
    """
    n, half = targets.shape[0], w.dtype is torch.float16
    scale = 1 / (FLOAT16_GRAD_SCALE * n) if half else 1 / n
    losses = torch.empty(n, dtype=torch.float32, device=h.device)
    grad_h, grad_w = torch.empty_like(h), torch.zeros_like(w, dtype=weight_dtype)
    buffer = _logits_buffer(h, w, n)
    for rows in _chunks(h):
        chunk_targets = targets[rows].unsqueeze(1)  # (C, 1)
        logits = _logits(h[rows], w, vocab_size, buffer)  # (C, V)
        # The probability of the target may underflow; that of the most likely token cannot.
        below = logits.gather(1, chunk_targets) - logits.amax(dim=-1, keepdim=True)  # (C, 1)
        probabilities = torch.softmax(logits, dim=-1, out=logits)
        losses[rows] = -(below + probabilities.amax(dim=-1, keepdim=True).log()).squeeze(1)
        # d loss / d logits = (softmax - onehot) / n. The division by n is cheaper on the smaller matrices below.
        probabilities.scatter_add_(1, chunk_targets, probabilities.new_full(chunk_targets.shape, -1.0))
        grad = (probabilities.mul_(FLOAT16_GRAD_SCALE) if half else probabilities).to(w.dtype)
        _product(grad, w, grad_h[rows])  # (C, D)
        if not half:
            grad_h[rows].div_(n)
        if w.dtype == weight_dtype:
            grad_w.addmm_(grad.t(), h[rows], alpha=scale)  # (V, D), without a second matrix of that size
        else:
            grad_w.add_(grad.t() @ h[rows], alpha=scale)  # (V, D)
    return losses, grad_h, grad_w


def _losses_and_gradients_compiled(
    h: Tensor, w: Tensor, targets: Tensor, vocab_size: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`_losses_and_gradients_in_place` in a form that the compiler can fuse.

    Only row reductions and elementwise operations stand between the matrix products, so the fused kernel reads the
    logits and writes their gradient in the compute dtype, and float32 exists only in registers. Buffers, or a scattered
    one-hot tensor, would each be a tensor of the chunk's size in memory.
    """
    n, columns = targets.shape[0], torch.arange(w.shape[0], device=h.device)  # (V,)
    half = w.dtype is torch.float16
    divisor = 1 / FLOAT16_GRAD_SCALE if half else n
    losses, grad_h, grad_w = [], [], torch.zeros_like(w, dtype=weight_dtype)
    for rows in _chunks(h):
        chunk_targets = targets[rows].unsqueeze(1)  # (C, 1)
        logits = (h[rows] @ w.t()).float()  # (C, V)
        if vocab_size < w.shape[0]:  # padding gets no probability and no gradient
            logits = torch.where(columns < vocab_size, logits, float("-inf"))
        total = logits.logsumexp(dim=-1, keepdim=True)  # (C, 1)
        onehot = columns == chunk_targets  # (C, V)
        losses.append((total - torch.where(onehot, logits, 0.0).sum(dim=-1, keepdim=True)).squeeze(1))
        grad = (((logits - total).exp() - onehot.float()) / divisor).to(w.dtype)  # (C, V)
        grad_h.append(grad @ w)  # (C, D)
        product = grad.t() @ h[rows]  # (V, D)
        grad_w = grad_w + (product.to(weight_dtype) * (divisor / n) if half else product)
    return torch.cat(losses), torch.cat(grad_h), grad_w


def _logits(h: Tensor, w: Tensor, vocab_size: int, buffer: Tensor) -> Tensor:
    """Logits in float32, in the buffer's memory if it is float32. Padding of the vocabulary gets minus infinity.

    Shapes:
        h (C, D); w (V, D); buffer (at least C, V); returns (C, V)
    """
    logits = _product(h, w.t(), buffer[: h.shape[0]]).float()
    logits[:, vocab_size:] = float("-inf")
    return logits


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the memory of `out`, which may be a slice."""
    if not _is_mps(out.device):
        return torch.mm(a, b, out=out)
    # On macOS 14, MPS silently leaves a slice unchanged (pytorch/pytorch#193385). On M1 and M2, a sum of 32,767 or more
    # terms includes what lies behind the operands in memory (pytorch/pytorch#195163).
    parts = (left @ right for left, right in zip(a.split(MPS_TERMS, dim=1), b.split(MPS_TERMS), strict=True))
    out.copy_(next(parts))
    for part in parts:
        out += part
    return out


def _is_mps(device: torch.device) -> bool:
    return device.type == "mps"


def _logits_buffer(h: Tensor, w: Tensor, n: int) -> Tensor:
    """Memory for the logits of a chunk, reused for all: on a CPU, fresh pages cost as much as the matrix product."""
    return torch.empty(min(_chunk_size(h), n), w.shape[0], dtype=h.dtype, device=h.device)


def _to_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype: autocast applies neither inside a Function nor to products with `out`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def _chunks(hidden: Tensor) -> list[slice]:
    n, size = hidden.shape[0], _chunk_size(hidden)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _chunk_size(hidden: Tensor) -> int:
    return CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
