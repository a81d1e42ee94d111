"""The feed-forward part: SwiGLU, GELU or squared ReLU.

Shapes: B batch, T sequence, D d_model, F d_ff.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from myllm.config import ModelConfig


class FeedForward(nn.Module):
    """D -> F -> D.

    Source: SwiGLU, Shazeer 2020 (arXiv 2002.05202), equation 6; GELU in the tanh form of GPT-2; squared ReLU, So et
    al. 2021 (Primer).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        # SwiGLU's gate and up projections are one matrix: rows of the gate, then rows of up.
        width = config.d_ff * (2 if config.activation == "swiglu" else 1)
        self.up_proj = nn.Linear(config.d_model, width, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout_ffn) if config.dropout_ffn else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """
        Shapes:
            x (B, T, D); returns (B, T, D)
        """
        h = self.up_proj(x)  # (B, T, F), or (B, T, 2F) for SwiGLU
        if self.activation == "swiglu":
            gate, up = h.chunk(2, dim=-1)  # (B, T, F) each
            h = F.silu(gate) * up
        elif self.activation == "gelu":
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.relu(h).square()
        return self.down_proj(self.dropout(h))
