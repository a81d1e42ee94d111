"""In which type a run computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import RunConfig


def computes_in_bfloat16(config: RunConfig, device: torch.device) -> bool:
    """Whether matrix products are in bfloat16; weights and optimizer are float32 either way."""
    return config.train.precision == "bfloat16" or (config.train.precision == "auto" and device.type == "cuda")


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bfloat16 where the config asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(config, device))


def may_use_tf32(config: RunConfig, device: torch.device) -> bool:
    """Whether products that are left in float32 may run on TF32's tensor cores.

    Where a run computes in bfloat16 anyway, TF32, whose mantissa is 3 bits longer, takes away nothing. A run that asks
    for float32 gets all of it.
    """
    return (
        device.type == "cuda"
        and computes_in_bfloat16(config, device)
        and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, the first that has it
    )


@contextmanager
def float32_products(config: RunConfig, device: torch.device) -> Iterator[None]:
    """TF32 where it is safe, for as long as a run lasts."""
    before = torch.get_float32_matmul_precision()
    if may_use_tf32(config, device):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
