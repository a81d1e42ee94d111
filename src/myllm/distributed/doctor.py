"""What `myllm doctor` finds out about this machine."""

import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from myllm import paths

from .cpu_threads import usable_cores
from .device_info import cuda_device_count, cuda_problem, device_name, gpu_problem, has_triton
from .precision import compute_dtype, describe_precision, has_bfloat16

PACKAGES = ("torch", "numpy", "tiktoken", "tokenizers", "datasets", "huggingface_hub", "tyro")
LEAST_FREE_BYTES = 5 * 10**9
FAST_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def check_machine() -> tuple[list[str], list[str]]:
    """A line for each thing worth knowing, and a sentence for each that will hinder training."""
    lines, faults = [f"python       {platform.python_version()} on {platform.platform()}"], []
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            faults.append(f"{name} is not installed: run src/environment.sh")
    lines.append(f"packages     {', '.join(found)}")
    lines.append(f"processor    {device_name(torch.device('cpu'))}, {usable_cores()} cores for this process")
    lines.append(f"memory       {memory()}")
    folder = next(path for path in (paths.temp_data(), *paths.temp_data().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    lines.append(f"disk         {free / 1e9:,.1f} GB free for {paths.temp_data()}")
    if free < LEAST_FREE_BYTES:
        faults.append(f"only {free / 1e9:,.1f} GB are free for {paths.temp_data()}: free some, or set MYLLM_DATA")
    lines += _devices(faults)
    return lines, faults


def memory() -> str:
    """Of the machine, as far as Linux says."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(rows[name].split()[0]) * 1_024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return "unknown here"
    return f"{total / 1e9:,.0f} GB, of which {available / 1e9:,.0f} GB are available"


def _devices(faults: list[str]) -> list[str]:
    """The accelerators that torch sees, and how fast attention goes there."""
    lines = []
    for index in range(cuda_device_count()):
        device = torch.device("cuda", index)
        about = torch.cuda.get_device_properties(device)
        if why := gpu_problem(device):
            faults.append(f"GPU {index}: {why}")
            lines.append(f"GPU {index}        {about.name}, which this torch has no kernels for")
            continue
        free, total = torch.cuda.mem_get_info(device)
        lines.append(
            f"GPU {index}        {about.name}, capability {about.major}.{about.minor}, {free / 1e9:,.0f} of "
            f"{total / 1e9:,.0f} GB free, attention: {_attention(device)}"
        )
        lines.append(f"  {how_it_trains(device)}")
    if lines:
        lines.insert(0, f"CUDA         {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
        return lines
    if torch.backends.mps.is_available():
        return ["GPU          Apple's, by way of MPS"]
    if why := cuda_problem():
        faults.append(f"torch cannot use the GPUs here: {why}")
    return [f"GPU          none that torch sees; attention on the processor: {_attention(torch.device('cpu'))}"]


def how_it_trains(device: torch.device) -> str:
    """What train.precision auto and train.compile auto mean on a card."""
    why = "" if has_bfloat16(device) else ", since the card has no bfloat16"
    compiled = "with torch.compile" if has_triton(device) else "without torch.compile: no Triton for this card here"
    return f"trains in {describe_precision('auto', device)}{why}, {compiled}"


def _attention(device: torch.device) -> str:
    """Which of the fast kernels of scaled_dot_product_attention run there."""
    dtype = compute_dtype("auto", device)
    q = torch.zeros(1, 2, 64, 64, device=device, dtype=dtype)
    there = []
    for kernel in FAST_ATTENTION:
        try:
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
            there.append(kernel.name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            continue
    return ", ".join(there) or "no fast kernel"
