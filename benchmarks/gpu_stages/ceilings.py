"""What the card can do at most: versions, order of attention kernels, memory traffic, the step's own products."""

import platform
from collections.abc import Iterator

import torch

from myllm.distributed.device_info import device_name, measure_matmul_flops
from myllm.distributed.precision import compute_dtype
from myllm.model import attention_backend as sdpa
from myllm.training.preflight.device_memory import available_bytes

from .bench import Bench, seconds_of
from .frame import Check, bounded, noted

# Source: the makers' data sheets, TB/s. A copy reaches four fifths to nine tenths of it.
MEMORY_TB_S = {"A100-40": 1.555, "A100-80": 2.0, "H100": 3.35, "H100-PCIe": 2.0, "H200": 4.8, "B200": 8.0}
LEAST_SHARE = 0.6
"""Of a data sheet's figure, below which something is wrong with the machine: another tenant, a power limit."""


def run(bench: Bench) -> Iterator[Check]:
    yield noted("versions", versions(bench))
    yield attention(bench)
    yield copy_rate(bench)
    yield products(bench)
    square = measure_matmul_flops(bench.device, compute_dtype("auto", bench.device)) / 1e12
    yield noted("square products, which the plan goes by", f"{square:,.1f} TFLOP/s", tflops=square)


def versions(bench: Bench) -> str:
    there = f"torch {torch.__version__}, Python {platform.python_version()}, {device_name(bench.device)}"
    if bench.on_cuda:
        major, minor = torch.cuda.get_device_capability(bench.device)
        there += f", capability {major}.{minor}, driver {driver()}, CUDA {torch.version.cuda}"
    return f"{there}, {available_bytes(bench.device) / 2**30:.1f} GiB free"


def driver() -> str:
    """As the driver itself says it; torch has no public name for it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return next((word for word in file.readline().split() if word[:1].isdigit() and "." in word), "unknown")
    except OSError:
        return "unknown"


def attention(bench: Bench) -> Check:
    """The kernel that training's shapes get. A card that trains in bfloat16 must have a fused one."""
    choice = sdpa.selected_backend(bench.model(), bench.device, torch.bfloat16)
    measured = choice.name + "".join(f"; {refusal}" for refusal in choice.rejections)
    if not bench.on_cuda:
        return noted("attention in training", measured)
    within = choice.name != "math"
    return Check("attention in training", "passed" if within else "out of bounds", measured, "a fused kernel")


def copy_rate(bench: Bench) -> Check:
    """Bytes read and written by a copy within the device."""
    size = 2**20 if bench.tiny else 2**31
    source = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rate = 2 * size / seconds_of(bench.device, lambda: target.copy_(source), 10, warm_up=2) / 1e12
    sheet = MEMORY_TB_S.get(bench.card.name) if bench.card else None
    return bounded("copy", rate, sheet and LEAST_SHARE * sheet, sheet, "TB/s", 2)


def products(bench: Bench) -> Check:
    """The matrix products of one layer and one chunk of the head, each as often as a step has it."""
    model, tokens = bench.model(), bench.config().train.micro_batch_size * bench.model().max_seq_len
    d, heads = model.d_model, model.n_heads * model.head_size
    up = model.d_ff * (2 if model.activation == "swiglu" else 1)
    qkv = heads + 2 * model.kv_heads * model.head_size
    layers = [(tokens, d, qkv), (tokens, heads, d), (tokens, d, up), (tokens, model.d_ff, d)]
    shapes = [(shape, model.n_layers) for shape in layers] + [((tokens, d, model.padded_vocab_size), 1)]
    flops = seconds = 0.0
    by_shape = {}
    for (m, k, n), times in shapes:
        rows = min(m, 16_384)  # of the head the logits of all tokens would not fit; a rate does not change from there
        a = torch.randn(rows, k, device=bench.device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=bench.device, dtype=torch.bfloat16)
        took = seconds_of(bench.device, lambda a=a, b=b: a @ b.t(), 3 if bench.tiny else 10, warm_up=2)
        by_shape[f"{m}x{k}x{n}"] = 2 * rows * k * n / took / 1e12
        flops += times * 2 * m * k * n
        seconds += times * took * m / rows
    rate = flops / seconds / 1e12
    bench.found["products_tflops"] = rate
    peak = bench.card and bench.card.tflops
    return bounded(
        "the step's products", rate, peak and LEAST_SHARE * peak, peak and 1.05 * peak, "TFLOP/s", by_shape=by_shape
    )
