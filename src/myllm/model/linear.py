"""A linear map that is as fast with a few rows as with many."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 2**22
"""Weights from which a matrix is more than a CPU's cache holds."""
FEW, FEW_LOGITS = 64, 16
"""Rows up to which a matrix is better on the left of the product. Of logits, whose columns are left lying as they come
out, fewer."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.

    Shapes:
        x (..., D); weight (N, D); bias (N,); returns (..., N)
    """
    if weight.numel() < LARGE or not _few_on_cpu(x, weight, FEW):
        return F.linear(x, weight, bias)
    y = _columns(x, weight).contiguous()
    return y if bias is None else y.add_(bias)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. A few rows of it are not one after the other in memory: what chooses among them reads them once.

    Shapes:
        x (..., D); weight (V, D); returns (..., V)
    """
    return _columns(x, weight) if _few_on_cpu(x, weight, FEW_LOGITS) else F.linear(x, weight)


def _few_on_cpu(x: Tensor, weight: Tensor, few: int) -> bool:
    # Gradients and graphs are simpler of the plain form, and a quantised matrix may know no other.
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter)
    return not plain and 1 < x.numel() // x.shape[-1] <= few and x.device.type == "cpu"


def _columns(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T as (W x^T)^T.

    On a CPU that is up to three times as fast with a few rows and a large matrix: the library packs what stands on the
    right before it multiplies, and of a matrix that is used but a few times that is most of the work.

    Shapes:
        x (..., D); weight (N, D); returns (..., N)
    """
    rows = x.flatten(0, -2)  # (rows, D)
    return (weight @ rows.t()).t().unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Shapes:
            x (..., D); returns (..., N)
        """
        return linear(x, self.weight, self.bias)
