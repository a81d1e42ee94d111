"""What the machine is, whether torch can use it, and how fast it can multiply."""

import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from .library_env import visible_gpus

CPU_SIZE, GPU_SIZE = 1_024, 8_192
"""Of the square products that are timed; smaller ones do not fill a card."""
TRITON_FROM = (7, 0)
"""Compute capability, Volta's."""
DRIVER_NEEDED = {11: "450", 12: "525", 13: "580"}
"""By the major version of the CUDA that torch is built for; a newer minor version needs no newer driver.
Source: NVIDIA, CUDA Compatibility, minor version compatibility."""
BUILDS = (
    ((13, 0), "2.13.0", "cu130", (7, 5)),
    ((12, 8), "2.11.0", "cu128", (7, 5)),
    ((12, 0), "2.13.0", "cu126", (5, 0)),
)
"""The CUDA that a driver is for, at least; a torch for it, of pyproject.toml's range, and where it is; the lowest
compute capability that it has kernels for. Source: RELEASE.md of pytorch/pytorch, and its issues 178665 and 190385."""


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
    while (took := time_on_device(multiply, device)) < seconds:
        products *= 2
    return 2 * size**3 * products / took


def time_on_device(work: Callable[[], None], device: torch.device) -> float:
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


# -- GPUs that torch cannot use ---------------------------------------------------------------------------------------


def cuda_device_count() -> int:
    """How many GPUs torch can compute on. torch.cuda.device_count() alone also counts those of a driver that is too old
    for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say of the driver, `cuda_problem` says with the remedy
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_problem() -> str | None:
    """Why torch cannot use the GPUs of this machine, and what to do; None where NVIDIA's driver is not installed, or
    hides its GPUs because the user said so."""
    chosen = visible_gpus()
    driver, cuda = nvidia_driver()
    if not driver or chosen in ("", "-1"):
        return None
    found = f"NVIDIA's driver {driver} is here" + (f", for CUDA up to {cuda[0]}.{cuda[1]}" if cuda else "")
    built = torch.version.cuda
    if not built:
        return f"{found}, but torch {torch.__version__} is a build without CUDA; {_install(cuda)}"
    major = int(built.partition(".")[0])
    needed = DRIVER_NEEDED.get(major)
    too_old = cuda[0] < major if cuda else bool(needed) and int(driver.partition(".")[0]) < int(needed)
    if too_old:
        newer = f"driver {needed} or newer" if needed else "a newer driver"
        torch_needs = f"torch {torch.__version__} is built for CUDA {built} and needs {newer}"
        return f"{found}, but {torch_needs}; update it, or {_install(cuda)}"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"{found}, which fits torch's CUDA {built}, but torch says: {str(error).strip().splitlines()[0]}"
    return f"{found}, but torch sees no GPU; CUDA_VISIBLE_DEVICES is {chosen!r}"


def gpu_problem(device: torch.device) -> str | None:
    """Why the installed torch has no kernels for a GPU that it sees, and what to do; None if it has."""
    kernels = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", each) for each in torch.cuda.get_arch_list()]
    if not all(kernels) or not kernels:  # another maker's GPU, or no GPU
        return None
    card = torch.cuda.get_device_capability(device)
    for kind, major, minor in (each.groups() for each in kernels if each):
        built = int(major), int(minor)
        # Machine code runs on later cards of its generation, and what is compiled at load on all later ones.
        if built <= card and (kind == "compute" or built[0] == card[0]):
            return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {card[0]}.{card[1]}, and torch "
        f"{torch.__version__} has kernels for {', '.join(torch.cuda.get_arch_list())} alone; "
        f"{_install(nvidia_driver()[1], card)}"
    )


def nvidia_driver() -> tuple[str | None, tuple[int, int] | None]:
    """The version of NVIDIA's driver and the newest CUDA that it is for, as nvidia-smi says; None where it does not."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    driver = re.search(r"Driver Version: *(\d[\d.]*)", done.stdout)
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+)\.(\d+)", done.stdout)
    return driver and driver[1], (int(cuda[1]), int(cuda[2])) if cuda else None


def _install(cuda: tuple[int, int] | None, card: tuple[int, int] | None = None) -> str:
    """What to type for a torch that fits a driver, and a card if one is given."""
    for least, version, index, lowest in BUILDS:
        if (cuda or (13, 0)) >= least and (card is None or card >= lowest):
            command = f"{shlex.quote(sys.executable)} -m pip install torch=={version}"
            return f"install one that fits it: {command} --index-url https://download.pytorch.org/whl/{index}"
    return f"install a driver {DRIVER_NEEDED[13]} or newer"
