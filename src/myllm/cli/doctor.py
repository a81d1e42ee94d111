"""What `myllm doctor` finds out about this machine."""

import platform
from importlib import metadata

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from myllm import paths
from myllm.distributed.cpu_threads import usable_cores
from myllm.distributed.device_info import cuda_device_count, cuda_problem, device_name, gpu_problem, has_triton
from myllm.distributed.precision import compute_dtype, describe_precision, has_bfloat16
from myllm.files import free_bytes
from myllm.training.preflight.device_memory import proc_bytes

PACKAGES = ("torch", "numpy", "tiktoken", "tokenizers", "datasets", "huggingface_hub", "tyro")
MIN_FREE_BYTES = 5 * 10**9
FAST_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def check_machine() -> tuple[list[str], list[str]]:
    """A line per fact about this machine, and a sentence per problem for training."""
    lines, problems = [f"python       {platform.python_version()} on {platform.platform()}"], []
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: run src/environment.sh")
    lines.append(f"packages     {', '.join(versions)}")
    lines.append(f"processor    {device_name(torch.device('cpu'))}, {usable_cores()} cores for this process")
    lines.append(f"memory       {describe_memory()}")
    root = paths.temp_data()
    free = free_bytes(root)
    lines.append(f"disk         {free / 1e9:,.1f} GB free for {root}")
    if free < MIN_FREE_BYTES:
        problems.append(f"only {free / 1e9:,.1f} GB are free for {root}: free some space, or set MYLLM_DATA")
    return lines + _describe_devices(problems), problems


def describe_memory() -> str:
    total, available = (proc_bytes("/proc/meminfo", key) for key in ("MemTotal", "MemAvailable"))
    if not total:
        return "unknown (no /proc/meminfo)"
    return f"{total / 1e9:,.0f} GB, of which {available / 1e9:,.0f} GB are available"


def _describe_devices(problems: list[str]) -> list[str]:
    """The accelerators that torch sees and their fast attention kernels; adds to `problems`."""
    lines = []
    for index in range(cuda_device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        if problem := gpu_problem(device):
            problems.append(f"GPU {index}: {problem}")
            lines.append(f"GPU {index}        {properties.name}, not supported by this torch")
            continue
        free, total = torch.cuda.mem_get_info(device)
        lines.append(
            f"GPU {index}        {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{free / 1e9:,.0f} of {total / 1e9:,.0f} GB free, attention: {_attention_kernels(device)}"
        )
        lines.append(f"  {how_it_trains(device)}")
    if lines:
        return [f"CUDA         {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}", *lines]
    if torch.backends.mps.is_available():
        return ["GPU          Apple's, through MPS"]
    if problem := cuda_problem():
        problems.append(f"torch cannot use the GPUs of this machine: {problem}")
    return [f"GPU          none visible to torch; attention on the CPU: {_attention_kernels(torch.device('cpu'))}"]


def how_it_trains(device: torch.device) -> str:
    """What train.precision auto and train.compile auto mean on a GPU."""
    reason = "" if has_bfloat16(device) else ", since the GPU has no bfloat16"
    compiled = "with torch.compile" if has_triton(device) else "without torch.compile: Triton does not support this GPU"
    return f"trains in {describe_precision('auto', device)}{reason}, {compiled}"


def _attention_kernels(device: torch.device) -> str:
    """Which fast kernels of scaled_dot_product_attention run on the device."""
    q = torch.zeros(1, 2, 64, 64, device=device, dtype=compute_dtype("auto", device))
    names = []
    for kernel in FAST_ATTENTION:
        try:
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
            names.append(kernel.name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            continue
    return ", ".join(names) or "no fast kernel"
