"""What the machine is and how fast it can multiply."""

import platform
import re
import time
from pathlib import Path

import torch

# Dense bf16 tensor-core peaks, FLOP/s, from the makers' data sheets: no sparsity, SXM parts unless named otherwise.
# GeForce figures are with FP32 accumulation, which is what training uses: half the headline rate of Ampere's and Ada's
# white papers (RTX 3060: 28 SMs x 512 FLOP a clock x 1.777 GHz).
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX 3060": 25.5e12,
}
OTHER_PART = r"(?! (?:Ti|SUPER|D|Laptop|Max-Q)\b)"
"""What makes a GeForce name that of another card."""


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a card by the name its driver gives, or None where it is unknown."""
    for name, peak in PEAK_BF16_FLOPS.items():
        if re.search(rf"\b{name}\b{OTHER_PART}", device_name, re.IGNORECASE):
            return peak
    return None


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
