"""The name of a device, whether torch can use it, and how fast it multiplies matrices."""

import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from .library_env import visible_gpus

CPU_SIZE, GPU_SIZE = 1_024, 8_192
"""Side of the matrices that are timed; smaller ones do not fill a GPU."""
TRITON_FROM = (7, 0)
"""Compute capability (Volta)."""
DRIVER_NEEDED = {11: "450", 12: "525", 13: "580"}
"""By the major version of the CUDA that torch is built for; a newer minor version needs no newer driver.
Source: NVIDIA, CUDA Compatibility, minor version compatibility."""
TORCH_BUILDS = (
    ((13, 0), "2.13.0", "cu130", (7, 5)),
    ((12, 8), "2.11.0", "cu128", (7, 5)),
    ((12, 0), "2.13.0", "cu126", (5, 0)),
)
"""Minimum CUDA of the driver; torch version, within pyproject.toml's range; package index; minimum compute capability.
Source: RELEASE.md of pytorch/pytorch, and its issues 178665 and 190385."""


def device_name(device: torch.device) -> str:
    """The name of the GPU or CPU model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def has_triton(device: torch.device) -> bool:
    """Whether torch.compile works on a GPU, where its kernels are Triton's.

    Source: torch/_dynamo/device_interface.py, CudaInterface.is_triton_capable; all AMD GPUs are.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= TRITON_FROM


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None, seconds: float = 0.5
) -> float:
    """FLOP/s of consecutive square matrix products. Takes about twice `seconds`.

    Args:
        size: of the matrices; None: large enough to fill the device.
    """
    size = size or (CPU_SIZE if device.type == "cpu" else GPU_SIZE)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    out, products = torch.empty_like(a), 1

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    multiply()  # warm-up
    while (elapsed := time_on_device(multiply, device)) < seconds:
        products *= 2
    return 2 * size**3 * products / elapsed


def time_on_device(work: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device has done what `work` launches."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for the work on an accelerator, which is only queued when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# -- GPUs that torch cannot use ---------------------------------------------------------------------------------------


def cuda_device_count() -> int:
    """How many GPUs torch can compute on. torch.cuda.device_count() alone also counts GPUs whose driver is too old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `cuda_problem` reports the driver, with a remedy
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_problem() -> str | None:
    """Why torch cannot use this machine's GPUs, and what to do. None if there is no NVIDIA driver, or the user has
    hidden the GPUs."""
    visible = visible_gpus()
    driver, cuda = nvidia_driver()
    if not driver or visible in ("", "-1"):
        return None
    found = f"NVIDIA's driver {driver} is installed" + (f", for CUDA up to {cuda[0]}.{cuda[1]}" if cuda else "")
    built = torch.version.cuda
    if not built:
        return f"{found}, but torch {torch.__version__} is a build without CUDA; {_install_advice(cuda)}"
    major = int(built.partition(".")[0])
    needed = DRIVER_NEEDED.get(major)
    too_old = cuda[0] < major if cuda else needed is not None and int(driver.partition(".")[0]) < int(needed)
    if too_old:
        newer = f"driver {needed} or newer" if needed else "a newer driver"
        torch_needs = f"torch {torch.__version__} is built for CUDA {built} and needs {newer}"
        return f"{found}, but {torch_needs}; update it, or {_install_advice(cuda)}"
    try:
        torch.cuda.init()
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        return f"{found}, which fits torch's CUDA {built}, but torch reports: {reason}"
    return f"{found}, but torch sees no GPU; CUDA_VISIBLE_DEVICES is {visible!r}"


def gpu_problem(device: torch.device) -> str | None:
    """Why the installed torch has no kernels for a visible GPU, and what to do; None if it has."""
    kernels = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    if not all(kernels) or not kernels:  # not NVIDIA's, or unknown
        return None
    capability = torch.cuda.get_device_capability(device)
    for kind, major, minor in (kernel.groups() for kernel in kernels if kernel):
        built = int(major), int(minor)
        # Machine code (sm) runs on later GPUs of its generation; intermediate code (compute) on all later GPUs.
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, but torch "
        f"{torch.__version__} only has kernels for {', '.join(torch.cuda.get_arch_list())}; "
        f"{_install_advice(nvidia_driver()[1], capability)}"
    )


def nvidia_driver() -> tuple[str | None, tuple[int, int] | None]:
    """The version of NVIDIA's driver and the newest CUDA that it supports, from nvidia-smi; None where unknown."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    driver = re.search(r"Driver Version: *(\d[\d.]*)", done.stdout)
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+)\.(\d+)", done.stdout)
    return driver and driver[1], (int(cuda[1]), int(cuda[2])) if cuda else None


def _install_advice(cuda: tuple[int, int] | None, capability: tuple[int, int] | None = None) -> str:
    """The command that installs a torch for a driver and, if given, for a GPU."""
    for min_cuda, version, index, min_capability in TORCH_BUILDS:
        if (cuda or (13, 0)) >= min_cuda and (capability is None or capability >= min_capability):
            command = f"{shlex.quote(sys.executable)} -m pip install torch=={version}"
            return f"install a torch that fits: {command} --index-url https://download.pytorch.org/whl/{index}"
    return f"install a driver {DRIVER_NEEDED[13]} or newer"
