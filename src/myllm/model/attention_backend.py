"""Which of torch's kernels attention runs on, and what makes torch take the fastest in training.

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
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from myllm.config import ModelConfig, TrainConfig

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
BACKEND_NAMES = {
    FLASH: "flash",
    CUDNN: "cuDNN",
    EFFICIENT: "memory-efficient",
    MATH: "math",
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
class SelectedBackend:
    """What attention runs on."""

    name: str
    rejections: tuple[str, ...] = ()
    """Why no better kernel is taken, in torch's words; only for the math path on a GPU."""


def training_backends(device: torch.device, train: TrainConfig | None = None) -> AbstractContextManager[None]:
    """Around the forward and backward passes of training: torch takes the fastest kernel of the card, or the one that
    the config puts first."""
    train = train or TrainConfig()
    if device.type == "cuda" or (device.type == "cpu" and train.attention != "auto"):
        return sdpa_kernel(list(backend_priority(device, train)), set_priority=True)
    return nullcontext()


def inference_backends(device: torch.device) -> AbstractContextManager[None]:
    """Around evaluations and generation, whose shapes change from batch to batch: cuDNN, which torch itself prefers on
    some cards, plans each shape anew, for a tenth of a second and more."""
    return sdpa_kernel([FLASH, EFFICIENT, MATH], set_priority=True) if device.type == "cuda" else nullcontext()


def backend_priority(device: torch.device, train: TrainConfig) -> tuple[SDPBackend, ...]:
    """The kernels that training may run on, the best first."""
    if train.attention == "math":
        return (MATH,)
    if train.deterministic:
        # Flash's backward pass has a form that repeats itself, which torch takes when told to; the memory-efficient one
        # has none and raises, cuDNN's depends on its version (aten/src/ATen/native/transformers/cuda).
        return (FLASH, MATH)
    if train.attention == "efficient":
        return (EFFICIENT, MATH)
    if train.attention == "flash":
        return (FLASH, EFFICIENT, MATH)
    newer = _switch("current_flash_attention_impl")() is not None
    card = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    cudnn_first = train.attention == "cudnn" or (card in CUDNN_FIRST and not newer)
    return (CUDNN, FLASH, EFFICIENT, MATH) if cudnn_first else (FLASH, CUDNN, EFFICIENT, MATH)


def selected_backend(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, train: TrainConfig | None = None
) -> SelectedBackend:
    """What training's shapes get on a device, by asking torch.

    Args:
        dtype: that attention computes in.
    """
    if device.type not in ("cpu", "cuda"):
        return SelectedBackend(f"only {device.type}")  # torch has no choice of kernels there
    train = train or TrainConfig()
    q, k, v = _inputs(config, device, dtype)
    grouped = config.n_heads != config.kv_heads
    with training_backends(device, train):
        if device.type == "cpu":
            return SelectedBackend(_chosen_on_cpu(q, k, v, grouped))
        params = SDPAParams(q, k, v, None, 0.0, True, grouped)
        takes = {FLASH: can_use_flash_attention, CUDNN: can_use_cudnn_attention, EFFICIENT: can_use_efficient_attention}
        order = backend_priority(device, train)
        first = next((backend for backend in order if backend is MATH or takes[backend](params)), MATH)
    newer = _switch("current_flash_attention_impl")()
    if first is MATH:
        return SelectedBackend("math", tuple(_refusals(params, [takes[each] for each in order if each is not MATH])))
    return SelectedBackend(f"flash ({newer})" if first is FLASH and newer else BACKEND_NAMES[first])


def _chosen_on_cpu(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> str:
    # What scaled_dot_product_attention itself asks. There is no public name for it, and only a log line depends on it.
    ask = getattr(torch, "_fused_sdp_choice", None)
    number = ask and ask(q, k, v, None, 0.0, True, enable_gqa=grouped)
    return next((name for backend, name in BACKEND_NAMES.items() if int(backend) == number), "CPU's")


@contextmanager
def use_newer_flash(config: ModelConfig, device: torch.device) -> Iterator[str | None]:
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


def _refusals(params: SDPAParams, can_use: list[Callable[..., bool]]) -> dict[str, None]:
    """Why torch does not take the kernels that training may run on, each reason once: it says so as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ask in can_use:
            ask(params, debug=True)
    return dict.fromkeys(str(each.message).split("(Triggered")[0].strip() for each in caught)


def _switch(name: str) -> Callable[..., Any]:
    """A function of torch.nn.attention that older versions lack; nothing in its place."""
    return getattr(attention, name, lambda: None)
