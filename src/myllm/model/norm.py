"""Normalisation over the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from myllm.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32 and returned in the input's type, as Llama does.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.least = torch.tensor(eps, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        x32, weight = float32(x), float32(self.weight)
        if x.device.type != "cpu":
            return F.rms_norm(x32, self.normalized_shape, weight, self.eps).type_as(x)
        # There is no kernel for a CPU: F.rms_norm is a chain of operations twice as long as this one.
        length = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self.least, length, length, value=1 / x.shape[-1])
        y = x32 * mean_square.rsqrt() * weight
        return y if x is x32 else y.type_as(x)


def float32(x: Tensor) -> Tensor:
    """x.float(), which takes its time even where there is nothing to do."""
    return x if x.dtype is torch.float32 else x.float()


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm over d_model that the config asks for."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, config.norm_eps)
