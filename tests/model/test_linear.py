"""The linear map in slices is the linear map."""

import pytest
import torch
import torch.nn.functional as F

from myllm.model.linear import LARGE, linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_slices_of_a_large_matrix(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(LARGE // 512 + 700, 512, generator=generator)  # the last slice is a part of one
    x = torch.randn(rows, 1, 512, generator=generator)
    b = torch.randn(len(weight), generator=generator) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x, weight, b).double(), expected, rtol=1e-5, atol=1e-4)
