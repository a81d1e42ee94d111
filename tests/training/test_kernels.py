"""What a run says about its kernels, and what it sets for them. Cards are made up: what is under test is the choice."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import with_train

from myllm.config import RunConfig
from myllm.distributed import device_info as hardware
from myllm.distributed.collectives import DistContext
from myllm.distributed.precision import allow_tf32
from myllm.errors import UserError
from myllm.model import attention_backend as sdpa
from myllm.model.transformer import Transformer
from myllm.training.kernels import fast_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def kernel_log(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The lines of a run's log about its kernels; on a card of a major compute capability, if one is given."""

    def lines(
        major: int | None = None, choice: sdpa.SelectedBackend | None = None, triton: str | None = "there", **train: Any
    ) -> list[str]:
        config = with_train(replace(tiny, model=replace(tiny.model, vocab_size=300)), **train)
        process = DistContext(0, 0, 1, CUDA if major else CPU)
        if major:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
            monkeypatch.setattr(hardware, "find_spec", lambda name: triton)
        if choice:
            monkeypatch.setattr(sdpa, "selected_backend", lambda *_: choice)
        found: list[str] = []
        with fast_kernels(Transformer(config.model), config, process, found.append):
            pass
        return found

    return lines


def test_kernel_log_on_cpu(kernel_log: Callable[..., list[str]]) -> None:
    assert kernel_log() == ["kernels: attention by the flash kernel; matrix products in float32; torch.compile off"]
    assert kernel_log(precision="bfloat16", compile="on") == [
        "kernels: attention by the flash kernel; matrix products in bfloat16; compiled block by block"
    ]


def test_kernel_log_on_gpu(kernel_log: Callable[..., list[str]]) -> None:
    flash = sdpa.SelectedBackend("flash")
    start = "kernels: attention by the flash kernel; matrix products in "
    assert kernel_log(8, flash) == [f"{start}bfloat16, TF32 for what is left in float32; compiled block by block"]
    scaled = f"{start}float16 with a loss scale, the rest in float32; "
    assert kernel_log(7, flash) == [f"{scaled}compiled block by block"]
    assert kernel_log(6, flash) == kernel_log(7, flash, triton=None) == [f"{scaled}torch.compile off"]
    line, warning = kernel_log(7, flash, precision="bfloat16")
    assert line == f"{start}bfloat16, the rest in float32; compiled block by block"
    assert "no bfloat16 arithmetic" in warning
    assert kernel_log(8, flash, activation_checkpointing=True, precision="float32") == [
        f"{start}float32; compiled block by block"
    ]


def test_math_attention_on_gpu_warns(kernel_log: Callable[..., list[str]]) -> None:
    _, warning = kernel_log(8, sdpa.SelectedBackend("math", ("head_dim should be at most 256", "no bfloat16 here")))
    assert warning.startswith("warning: attention runs on torch's math backend")
    assert warning.endswith(":\n  - head_dim should be at most 256\n  - no bfloat16 here")
    assert kernel_log(8, sdpa.SelectedBackend("math"))[1].endswith("no reason given")
    assert len(kernel_log(None, sdpa.SelectedBackend("math"))) == 1  # a CPU's own business


@pytest.mark.parametrize(
    ("major", "precision", "expected"),
    [(8, "auto", "high"), (9, "bfloat16", "high"), (7, "auto", "highest"), (9, "float32", "highest")],
)
def test_tf32(tiny: RunConfig, major: int, precision: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run computes in bfloat16 and the card has it; who asks for float32 gets it; as before afterwards."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
    config = with_train(tiny, precision=precision)
    with allow_tf32(config, CUDA):
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"
    with allow_tf32(with_train(tiny, precision="bfloat16"), CPU):
        assert torch.get_float32_matmul_precision() == "highest"


def test_mps_refuses_micro_batches_with_wrong_gradients(tiny: RunConfig) -> None:
    """A sum over 32,767 tokens and more reads other memory there; one below is the most of a run."""
    process = DistContext(0, 0, 1, torch.device("mps"))
    for tokens, refused in ((32_766, False), (32_768, True)):
        config = with_train(replace(tiny, model=replace(tiny.model, vocab_size=300, max_seq_len=tokens // 2)))
        config = with_train(config, micro_batch_size=2, batch_tokens=tokens)
        with (
            pytest.raises(UserError, match="is 32,768 tokens, but on MPS") if refused else nullcontext(),
            fast_kernels(Transformer(config.model), config, process),
        ):
            pass
