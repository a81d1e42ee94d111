"""Normalisation over the last dimension."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32 and returned in the input's type, as Llama does.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm over d_model that the config asks for."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, eps=config.norm_eps)
