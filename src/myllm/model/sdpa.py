"""Which of torch's kernels attention runs on in training, and what makes torch take the fastest.

Torch has several behind `scaled_dot_product_attention`: flash (FlashAttention-2, or a newer one that is installed),
cuDNN's, a memory-efficient one, and plain mathematics, which holds all T x T scores. It takes the first of its order
that can do the shapes.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import ModelConfig

NAMES = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}
NEWER_FLASH = {9: ("FA3", "FA4"), 10: ("FA4",)}
"""By the major compute capability of a card, the best first. Source: torch/nn/attention/_fa3.py and _fa4.py, which ask
for Hopper, and for Hopper or Blackwell."""
CUDNN_FIRST = (9, 10)
"""Major compute capabilities, Hopper and data-centre Blackwell, where cuDNN's kernel is faster than FlashAttention-2 by
up to three quarters. Source: release notes of PyTorch 2.5."""
TOLERANCE = 0.02
"""Of a newer kernel's output and gradients, relative, in bfloat16."""


@dataclass(frozen=True)
class Choice:
    """What attention runs on."""

    name: str
    refusals: tuple[str, ...] = ()
    """Why no better kernel is taken, in torch's words; only for the math path on a GPU."""


def fastest(device: torch.device) -> AbstractContextManager[None]:
    """Around the forward and backward passes of training: torch takes the fastest kernel of the card.

    Not around evaluations: their shapes change from batch to batch, and cuDNN plans each shape anew.
    """
    if device.type != "cuda":
        return nullcontext()
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    newer = _switch("current_flash_attention_impl")() is not None
    cudnn_first = torch.cuda.get_device_capability(device)[0] in CUDNN_FIRST and not newer
    order = (cudnn, flash) if cudnn_first else (flash, cudnn)
    return sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def chosen(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Choice:
    """What training's shapes get on a device, by asking torch.

    Args:
        dtype: that attention computes in.
    """
    if device.type not in ("cpu", "cuda"):
        return Choice(f"only {device.type}")  # torch has no choice of kernels there
    q, k, v = _inputs(config, device, dtype)
    grouped = config.n_heads != config.kv_heads
    with fastest(device):
        # What scaled_dot_product_attention itself asks; there is no public name for it.
        number = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=grouped)
    backend = SDPBackend.__members__.values()
    name = next((NAMES.get(each, each.name) for each in backend if int(each) == number), f"number {number}")
    refusals = _refusals(SDPAParams(q, k, v, None, 0.0, True, grouped)) if _is_slow(name, device) else ()
    newer = _switch("current_flash_attention_impl")()
    return Choice(f"flash ({newer})" if name == "flash" and newer and device.type == "cuda" else name, refusals)


@contextmanager
def newer_flash(config: ModelConfig, device: torch.device) -> Iterator[str | None]:
    """A newer FlashAttention in place of torch's own, if one is installed that suits the card and computes right.

    Gives:
        what to say about it, or None where there is nothing to say.
    """
    offered = _switch("list_flash_attention_impls")() or ()
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    remarks = []
    for name in NEWER_FLASH.get(major, ()):
        if name not in offered:
            continue
        try:
            attention.activate_flash_attention_impl(name)
        except ImportError:  # not installed, which is no news
            continue
        except Exception as error:  # a prototype: whatever is wrong with it, there is torch's own
            remarks.append(f"{name} is installed and does not start: {error}")
            continue
        try:
            fault = _fault(config, device)
            if fault is None:
                yield "; ".join(remarks) or None
                return
            remarks.append(f"{name} is installed and not used: {fault}")
        finally:
            attention.restore_flash_attention_impl()
    yield "; ".join(remarks) or None


def _fault(config: ModelConfig, device: torch.device) -> str | None:
    """What is wrong with the flash kernel that is active, for a model's heads; None if nothing is."""
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = _output_and_gradients(config, device)
        with sdpa_kernel(SDPBackend.MATH):
            expected = _output_and_gradients(config, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))
    return None if worst < TOLERANCE else f"its results are off by {worst:.1%}"


def _output_and_gradients(config: ModelConfig, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    heads = _inputs(config, device, torch.bfloat16)
    filled = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype).requires_grad_() for x in heads]
    out = F.scaled_dot_product_attention(*filled, is_causal=True, enable_gqa=config.n_heads != config.kv_heads)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), filled)


def _inputs(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as training has them, in strides too, of two sequences."""
    total = config.n_heads + 2 * config.kv_heads
    shape = 2, config.max_seq_len, total, config.head_size  # (B, T, H + 2G, K)
    heads = torch.empty(shape, device=device, dtype=dtype).requires_grad_().transpose(1, 2)
    return list(heads.split((config.n_heads, config.kv_heads, config.kv_heads), dim=1))


def _is_slow(name: str, device: torch.device) -> bool:
    return name == "math" and device.type == "cuda"


def _refusals(params: SDPAParams) -> tuple[str, ...]:
    """Torch says why as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        can_use_flash_attention(params, debug=True)
        can_use_cudnn_attention(params, debug=True)
    return tuple(dict.fromkeys(str(each.message).split("(Triggered")[0].strip() for each in caught))


def _switch(name: str) -> Callable[..., Any]:
    """A function of torch.nn.attention that older versions lack; nothing in its place."""
    return getattr(attention, name, lambda: None)
