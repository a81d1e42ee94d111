"""In which type a run computes, and whether its steps repeat themselves to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from myllm.config import RunConfig

BFLOAT16_FROM = (8, 0)
"""Compute capability, Ampere's, from which NVIDIA's cards multiply in bfloat16, and in TF32. Source: CUDA C++
Programming Guide, "Features and Technical Specifications"; torch emulates bfloat16 below it, many times slower."""


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of matrix products; weights and optimizer are float32 in any case.

    Args:
        precision: as train.precision has it.
    """
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device has arithmetic for it; of AMD's cards, all that torch supports do."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BFLOAT16_FROM


def needs_loss_scale(precision: str, device: torch.device) -> bool:
    """Whether the loss is multiplied before its backward pass (guard.py), since float16 has no small numbers."""
    return compute_dtype(precision, device) is torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_precision(precision: str, device: torch.device) -> str:
    """As plan, preflight, doctor and log say it."""
    dtype = compute_dtype(precision, device)
    return dtype_name(dtype) + " with a loss scale" * (dtype is torch.float16)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The type that the config asks for, for matrix products."""
    return autocast_to(compute_dtype(config.train.precision, device), device)


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 or float16; nothing of the kind for float32."""
    half = dtype is not torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def may_use_tf32(config: RunConfig, device: torch.device) -> bool:
    """Whether products that are left in float32 may run on TF32's tensor cores.

    Where a run computes in bfloat16 anyway, TF32, whose mantissa is 3 bits longer, takes away nothing, nor from one in
    float16, whose mantissa is as long. A run that asks for float32 gets all of it.
    """
    return (
        device.type == "cuda"
        and compute_dtype(config.train.precision, device) is not torch.float32
        and torch.cuda.get_device_capability(device) >= BFLOAT16_FROM
    )


@contextmanager
def allow_tf32(config: RunConfig, device: torch.device) -> Iterator[None]:
    """TF32 where it is safe, for as long as a run lasts."""
    before = torch.get_float32_matmul_precision()
    if may_use_tf32(config, device):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Around a training step: on CUDA only kernels that give the same bits each time. What has none is an error.

    What is compiled inside comes without atomic sums, and without reductions that are tuned by the clock. cuBLAS has to
    be told before it is first used: see launcher.make_cublas_deterministic.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over memory, and guards against bugs
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
