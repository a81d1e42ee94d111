"""The linear map in another order of multiplication is the linear map."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from myllm.config import ModelConfig
from myllm.model.linear import LARGE, linear, logits
from myllm.model.transformer import Transformer

ROWS = [(1,), (3,), (3, 1), (2, 5), (16, 1), (70,), (0,)]


def made(rows: tuple[int, ...], width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*rows, width, generator=generator), torch.randn(LARGE // 512 + 7, width, generator=generator)


@pytest.mark.parametrize("width", [16, 512])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_few_rows_and_a_large_matrix(rows: tuple[int, ...], bias: bool, width: int) -> None:
    x, weight = made(rows, width)
    b = torch.randn(len(weight)) if bias else None
    y = linear(x, weight, b)
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    assert y.is_contiguous()


@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_logits(rows: tuple[int, ...]) -> None:
    x, weight = made(rows, 64)
    expected = F.linear(x.double(), weight.double())
    torch.testing.assert_close(logits(x, weight).double(), expected, rtol=1e-5, atol=1e-4)


def test_gradients() -> None:
    x, weight = (each.requires_grad_() for each in made((3,), 512))
    for function in (linear, logits):
        found = torch.autograd.grad(function(x, weight).square().sum(), (x, weight))
        expected = torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_model_s_logits_can_be_viewed() -> None:
    model = Transformer(ModelConfig(vocab_size=50, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_seq_len=16)).eval()
    assert model(torch.zeros(2, 3, dtype=torch.long)).view(-1).shape == (2 * 3 * 50,)


@torch.no_grad()
def test_bfloat16_stays_so() -> None:
    x, weight = made((3,), 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, torch.zeros(len(weight))).dtype == torch.bfloat16
