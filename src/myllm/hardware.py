"""What the machine is and how fast it can multiply."""

import platform
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

CPU_SIZE, GPU_SIZE = 1_024, 8_192
"""Of the square products that are timed; smaller ones do not fill a card."""
TRITON_FROM = (7, 0)
"""Compute capability, Volta's."""


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


def has_triton(device: torch.device) -> bool:
    """Whether torch.compile, whose kernels for a GPU are Triton's, works there.

    Source: torch/_dynamo/device_interface.py, CudaInterface.is_triton_capable; of AMD's cards all are.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= TRITON_FROM


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None, seconds: float = 0.5
) -> float:
    """FLOP/s of square matrix products, one behind the other; takes about twice as long as `seconds`.

    Args:
        size: of the matrices; None: what fills the device.
    """
    size = size or (CPU_SIZE if device.type == "cpu" else GPU_SIZE)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    out, products = torch.empty_like(a), 1

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    multiply()  # first calls set things up
    while (took := seconds_of(multiply, device)) < seconds:
        products *= 2
    return 2 * size**3 * products / took


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """How long the device takes for what `work` hands it. Waits once, at the end; on CUDA it is timed by the card."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1_000
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()
