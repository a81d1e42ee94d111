"""Select the kernel that attention runs on.

`scaled_dot_product_attention` has several: flash (FlashAttention-2, or a newer one that is installed), cuDNN,
memory-efficient, and math, which holds all T x T scores in memory. It runs the first in order of priority that supports
the shapes.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

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
BACKEND_NAMES = {FLASH: "flash", CUDNN: "cuDNN", EFFICIENT: "memory-efficient", MATH: "math"}
NEWER_FLASH = {9: ("FA3", "FA4"), 10: ("FA4",)}
"""By major compute capability, the best first. Source: torch/nn/attention/_fa3.py and _fa4.py, which require
Hopper, and Hopper or Blackwell."""
CUDNN_FIRST = (9, 10)
"""Major compute capabilities (Hopper, data-center Blackwell) where cuDNN is up to 75 % faster than FlashAttention-2.
Source: release notes of PyTorch 2.5."""
TOLERANCE = 0.02
"""Largest relative error of a newer kernel's output and gradients, in bfloat16."""


@dataclass(frozen=True)
class SelectedBackend:
    """The kernel that attention runs on."""

    name: str
    rejections: tuple[str, ...] = ()
    """Why no faster kernel was selected, in torch's words. Only for math on a GPU."""


def training_backends(device: torch.device, train: TrainConfig | None = None) -> AbstractContextManager[None]:
    """Context of the forward and backward passes of training: the fastest kernel of the device, or train.attention."""
    train = train or TrainConfig()
    if device.type == "cuda" or (device.type == "cpu" and train.attention != "auto"):
        return sdpa_kernel(list(backend_priority(device, train)), set_priority=True)
    return nullcontext()


def inference_backends(device: torch.device) -> AbstractContextManager[None]:
    """Context of evaluations and generation. Their shapes vary, and cuDNN needs over 0.1 s for a new shape."""
    return sdpa_kernel([FLASH, EFFICIENT, MATH], set_priority=True) if device.type == "cuda" else nullcontext()


def backend_priority(device: torch.device, train: TrainConfig) -> tuple[SDPBackend, ...]:
    """The kernels that training may run on, in order of priority."""
    if train.attention == "math":
        return (MATH,)
    if train.deterministic:
        # Flash has a deterministic backward pass, which torch uses in deterministic mode. The memory-efficient kernel
        # has none and raises; for cuDNN it depends on the version (aten/src/ATen/native/transformers/cuda).
        return (FLASH, MATH)
    if train.attention == "efficient":
        return (EFFICIENT, MATH)
    if train.attention == "flash":
        return (FLASH, EFFICIENT, MATH)
    newer = attention.current_flash_attention_impl() is not None
    card = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    cudnn_first = train.attention == "cudnn" or (card in CUDNN_FIRST and not newer)
    return (CUDNN, FLASH, EFFICIENT, MATH) if cudnn_first else (FLASH, CUDNN, EFFICIENT, MATH)


def selected_backend(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, train: TrainConfig | None = None
) -> SelectedBackend:
    """The kernel that torch runs for the shapes of training.

    Args:
        dtype: of queries, keys and values.
    """
    if device.type not in ("cpu", "cuda"):
        return SelectedBackend(f"only {device.type}")  # torch has a single kernel there
    train = train or TrainConfig()
    q, k, v = _inputs(config, device, dtype)
    grouped = config.n_heads != config.kv_heads
    with training_backends(device, train):
        if device.type == "cpu":
            # scaled_dot_product_attention calls this private function. Only a log line depends on it.
            number = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=grouped)
            return SelectedBackend(BACKEND_NAMES[SDPBackend(number)])
        params = SDPAParams(q, k, v, None, 0.0, True, grouped)
        can_use = {
            FLASH: can_use_flash_attention,
            CUDNN: can_use_cudnn_attention,
            EFFICIENT: can_use_efficient_attention,
        }
        priority = backend_priority(device, train)
        first = next((backend for backend in priority if backend is MATH or can_use[backend](params)), MATH)
    newer = attention.current_flash_attention_impl()
    if first is MATH:
        checks = [can_use[backend] for backend in priority if backend is not MATH]
        return SelectedBackend("math", tuple(_rejections(params, checks)))
    return SelectedBackend(f"flash ({newer})" if first is FLASH and newer else BACKEND_NAMES[first])


@contextmanager
def use_newer_flash(config: ModelConfig, device: torch.device) -> Iterator[str | None]:
    """Replace torch's FlashAttention by a newer one, if it is installed, supports the card and gives correct results.

    Yields:
        a warning about versions that are installed and not used, or None.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    problems = []
    for name in NEWER_FLASH.get(major, ()):
        if name not in attention.list_flash_attention_impls():
            continue
        try:
            attention.activate_flash_attention_impl(name)
        except ImportError:  # not installed
            continue
        except Exception as error:  # these are prototypes; torch's own remains
            problems.append(f"{name} is installed but cannot be activated: {error}")
            continue
        try:
            problem = _flash_error(config, device)
            if problem is None:
                yield "; ".join(problems) or None
                return
            problems.append(f"{name} is installed but not used: {problem}")
        finally:
            attention.restore_flash_attention_impl()
    yield "; ".join(problems) or None


def _flash_error(config: ModelConfig, device: torch.device) -> str | None:
    """What is wrong with the results of the active flash kernel for the model's heads, or None."""
    try:
        with sdpa_kernel(FLASH):
            actual = _output_and_gradients(config, device)
        with sdpa_kernel(MATH):
            expected = _output_and_gradients(config, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(actual, expected, strict=True))
    return None if worst < TOLERANCE else f"its results differ from math by {worst:.1%}"


def _output_and_gradients(config: ModelConfig, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    heads = _inputs(config, device, torch.bfloat16)
    inputs = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype).requires_grad_() for x in heads]
    q, k, v = inputs
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=config.n_heads != config.kv_heads)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)


def _inputs(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of two sequences, with the shapes and strides of training."""
    total = config.n_heads + 2 * config.kv_heads
    shape = 2, config.max_seq_len, total, config.head_size  # (B, T, H + 2G, K)
    heads = torch.empty(shape, device=device, dtype=dtype).requires_grad_().transpose(1, 2)
    return list(heads.split((config.n_heads, config.kv_heads, config.kv_heads), dim=1))


def _rejections(params: SDPAParams, checks: list[Callable[..., bool]]) -> dict[str, None]:
    """Why torch rejects the kernels that training may run on, without repetitions. It gives reasons as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for check in checks:
            check(params, debug=True)
    return dict.fromkeys(str(warning.message).split("(Triggered")[0].strip() for warning in caught)
