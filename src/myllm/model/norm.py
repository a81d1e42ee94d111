"""Normalization over the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from myllm.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm, computed in float32 and returned in the input's type, as in Llama.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.eps_tensor = torch.tensor(eps, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        x32, weight = x.float(), self.weight.float()
        if x.device.type != "cpu":
            return F.rms_norm(x32, self.normalized_shape, weight, self.eps).type_as(x)
        # torch has no CPU kernel: F.rms_norm is a chain of operations that takes nearly twice as long as this one.
        length = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self.eps_tensor, length, length, value=1 / x.shape[-1])
        return (x32 * mean_square.rsqrt() * weight).type_as(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm over d_model that the config selects."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, config.norm_eps)
