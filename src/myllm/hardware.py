"""What the machine is and how fast it can multiply."""

import platform
import time
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The name of the card, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()


def measure_matmul_flops(device: torch.device, size: int = 1_024, seconds: float = 0.5) -> float:
    """FLOP/s of square matrix products, in the type that training would use there; takes about `seconds`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    (a @ b).sum().item()  # first calls set things up
    products, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        (a @ b).sum().item()
        products += 1
    return 2 * size**3 * products / elapsed
