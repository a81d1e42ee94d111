"""In which type a run computes."""

import torch

from .config import RunConfig


def computes_in_bfloat16(config: RunConfig, device: torch.device) -> bool:
    """Whether matrix products are in bfloat16; weights and optimizer are float32 either way."""
    return config.train.precision == "bfloat16" or (config.train.precision == "auto" and device.type == "cuda")


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bfloat16 where the config asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(config, device))
