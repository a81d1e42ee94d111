"""The dtype of matrix products (autocast), TF32, and bitwise deterministic steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from myllm.config import RunConfig

BFLOAT16_FROM = (8, 0)
"""Compute capability (Ampere) from which NVIDIA's GPUs multiply in bfloat16 and TF32. Source: CUDA C++ Programming
Guide, "Features and Technical Specifications". Below it, torch emulates bfloat16, many times slower."""


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of matrix products. Weights and optimizer state are always float32.

    Args:
        precision: a value of train.precision.
    """
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16; all AMD GPUs that torch supports do."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BFLOAT16_FROM


def needs_loss_scale(precision: str, device: torch.device) -> bool:
    """Whether the loss is scaled before the backward pass (gradient_guard.py): float16 has a small exponent range."""
    return compute_dtype(precision, device) is torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_precision(precision: str, device: torch.device) -> str:
    dtype = compute_dtype(precision, device)
    return dtype_name(dtype) + " with a loss scale" * (dtype is torch.float16)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    return autocast_to(compute_dtype(config.train.precision, device), device)


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Disabled for float32."""
    half = dtype is not torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def may_use_tf32(config: RunConfig, device: torch.device) -> bool:
    """Whether products that stay in float32 may use TF32.

    TF32 loses nothing in a run that computes in bfloat16 or float16, whose mantissas are no longer. A run that asks
    for float32 gets full float32.
    """
    return (
        device.type == "cuda"
        and compute_dtype(config.train.precision, device) is not torch.float32
        and torch.cuda.get_device_capability(device) >= BFLOAT16_FROM
    )


@contextmanager
def allow_tf32(config: RunConfig, device: torch.device) -> Iterator[None]:
    """TF32 for the `with` block, if `may_use_tf32`."""
    before = torch.get_float32_matmul_precision()
    if may_use_tf32(config, device):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Around a training step: only kernels that give the same bits every time; an operation without one is an error.

    Code compiled inside uses no atomic sums and no reductions tuned by timing. cuBLAS must be configured before its
    first use: see launcher.make_cublas_deterministic.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module whose setting no type checker sees
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills
