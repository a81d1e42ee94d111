"""The reference run's model, written from the description of its checkpoint and sharing nothing with ours."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class HParams:
    """What its checkpoints hold a pickle of, there in a module `src.params`."""

    n_vocab: int = 50_257
    n_ctx: int = 32
    n_embd: int = 24
    n_head: int = 3
    n_layer: int = 2
    ffn_act_pdrop: float = 0.15
    attn_res_pdrop: float = 0.1


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, p: HParams) -> None:
        super().__init__()
        self.heads = p.n_head
        self.qkv_proj, self.out_proj = nn.Linear(p.n_embd, 3 * p.n_embd), nn.Linear(p.n_embd, p.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (each.view(B, T, self.heads, -1).transpose(1, 2) for each in self.qkv_proj(x).split(D, -1))
        q, k = turned(q), turned(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(D / self.heads)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))


def turned(x: Tensor) -> Tensor:
    """Rotary positions by complex numbers, dimension i with i + K/2."""
    size = x.shape[-1]
    rates = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones(1), torch.outer(torch.arange(x.shape[-2]), rates))  # (T, K/2)
    y = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
    return torch.cat((y.real, y.imag), -1)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = x.chunk(2, -1)
        return up * nn.functional.silu(gate)


class FFN(nn.Module):
    def __init__(self, p: HParams) -> None:
        super().__init__()
        d_ff = 4 * p.n_embd
        self.net = nn.Sequential(
            nn.Linear(p.n_embd, 2 * d_ff), SwiGLU(), nn.Dropout(p.ffn_act_pdrop), nn.Linear(d_ff, p.n_embd)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    def __init__(self, p: HParams) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(p.n_embd), RMSNorm(p.n_embd)
        self.attn, self.ffn = Attention(p), FFN(p)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class ReferenceModel(nn.Module):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, p: HParams) -> None:
        super().__init__()
        self.embd = nn.Embedding(p.n_vocab, p.n_embd)
        self.transformer_blocks = nn.ModuleList(Block(p) for _ in range(p.n_layer))
        self.norm = RMSNorm(p.n_embd)
        self.out_proj = nn.Linear(p.n_embd, p.n_vocab, bias=False)
        self.out_proj.weight = self.embd.weight
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise) if parameter.ndim == 1 else parameter.copy_(
                    noise / parameter.shape[1] ** 0.5
                )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embd(tokens)
        for block in self.transformer_blocks:
            x = block(x)
        return self.out_proj(self.norm(x))
