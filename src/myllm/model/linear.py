"""A linear map that is as fast with a few rows as with many."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 2**22
"""Weights from which a matrix is multiplied in slices."""
SLICE = 1_024
"""Rows of the matrix in a slice."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.

    On a CPU the library is a quarter slower with a few tokens and a matrix larger than its cache than with slices of
    the matrix, one after the other; with one token, or a smaller matrix, slices gain nothing.

    Shapes:
        x (..., D); weight (N, D); bias (N,); returns (..., N)
    """
    small = weight.numel() < LARGE or x.numel() == x.shape[-1]
    # Gradients and graphs are simpler of the whole, and a quantised matrix may not be cut.
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter)
    if small or whole or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    cuts = [slice(first, first + SLICE) for first in range(0, len(weight), SLICE)]
    return torch.cat([F.linear(x, weight[cut], None if bias is None else bias[cut]) for cut in cuts], dim=-1)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Shapes:
            x (..., D); returns (..., N)
        """
        return linear(x, self.weight, self.bias)
