"""Large matrices lie on huge pages, and nothing else about them is different."""

import copy
import io
import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from myllm.config import ModelConfig
from myllm.model.huge_pages import HUGE, on_huge_pages, use_huge_pages
from myllm.model.transformer import Transformer

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def large(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(1_500, 1_501, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert values.nbytes > HUGE
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_values(dtype: torch.dtype) -> None:
    x = large(dtype)
    there = on_huge_pages(x)
    assert torch.equal(there, x)
    assert there.is_contiguous()
    assert (there.dtype, there.shape) == (x.dtype, x.shape)
    assert there.untyped_storage().nbytes() == x.nbytes  # what a file of it holds
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert there.data_ptr() != x.data_ptr()
        assert there.data_ptr() % HUGE == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has them")
def test_the_system_gave_some() -> None:
    if not ENABLED.is_file() or "[never]" in ENABLED.read_text():
        pytest.skip("this kernel gives none")
    there, inside, sizes = on_huge_pages(large()), False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            inside = start <= there.data_ptr() < end
        elif inside and line.startswith(("VmFlags", "AnonHugePages")):
            sizes.append(line)
    assert any("hg" in line.split() for line in sizes), (
        sizes
    )  # asked for; whether it has any left is the system's affair


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says")
def test_no_more_memory_than_before() -> None:
    """Of a page that a matrix fills in part, no more than that part."""
    x, status = torch.ones(HUGE // 4 * 3 + 1_000), Path("/proc/self/statm")
    before = int(status.read_text().split()[1])
    there = [on_huge_pages(x) for _ in range(20)]
    pages = int(status.read_text().split()[1]) - before
    assert pages * mmap.PAGESIZE < 1.1 * sum(one.nbytes for one in there)


def test_small_ones_and_those_elsewhere_stay() -> None:
    small, elsewhere = torch.zeros(100), torch.empty(1_500, 1_500, device="meta")
    assert on_huge_pages(small) is small
    assert on_huge_pages(elsewhere) is elsewhere


@pytest.mark.parametrize("missing", ["constant", "kernel"])
def test_systems_without(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "constant":  # macOS, Windows
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12_345, raising=False)  # EINVAL
    x = large()
    assert on_huge_pages(x) is x


def test_a_module_is_what_it_was() -> None:
    module = nn.Linear(1_500, 1_000)
    values = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = list(module.parameters())
    use_huge_pages(module)
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
    module(torch.randn(3, 1_500)).sum().backward()
    assert module.weight.grad.shape == module.weight.shape
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    for found in (torch.load(file), copy.deepcopy(module).state_dict()):
        assert all(torch.equal(found[name], value) for name, value in values.items())


def test_a_model_s_large_matrices() -> None:
    model = Transformer(ModelConfig(vocab_size=50_257, d_model=64, n_layers=1, n_heads=2, d_ff=64, max_seq_len=16))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert model.embedding.weight.data_ptr() % HUGE == 0
