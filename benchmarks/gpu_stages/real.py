"""The real step: lf-llm-269m at full depth. Compile time, MFU, kernels, peak memory.

Shapes: B sequences, H heads, T tokens of a sequence, K head dimension.
"""

import gzip
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from myllm.config import RunConfig
from myllm.paths import RunPaths
from myllm.planning.flops import flops_per_token
from myllm.planning.forecast import EXPECTED_MFU
from myllm.training.preflight.device_memory import peak_bytes
from myllm.training.profiler import TABLE, TRACE, Cost, Profiler
from myllm.training.setup import RunContext

from .bench import Bench, graph_breaks, graphs, relative_error, seconds_of, wall_seconds
from .frame import Check, bounded, close, correct, noted
from .steps import Steps, made_up, stage_folder

STEPS = 8
COMPILE_S = 90.0
"""That the compiler may take, with no cache."""
EXPECTED = {"H100": 0.46, "H200": 0.46}
"""MFU by card, for biases and dropout as the reference has them: docs/speed.md has the arithmetic."""
LEAST = 0.85
"""Of an expected MFU or a predicted peak, below which one of the two is wrong."""
MOST_MEMORY = 1.05
ATTENTION_TOKENS = 65_536
ATTENTION_ERROR = 2e-2
GROUPS = {
    "products": ("gemm", "nvjet", "cutlass", "aten::mm", "addmm"),
    "attention": ("flash", "cudnn", "fmha", "attention"),
    "fused": ("triton_",),
}
"""By what a kernel's name contains."""


@dataclass(frozen=True)
class Timed:
    """One way to train, measured."""

    compile_s: float
    step_s: float
    mfu: float | None
    """Of the card's peak; None where that is not known."""
    peak_bytes: int
    loss: float

    def __str__(self) -> str:
        mfu = "" if self.mfu is None else f", {self.mfu:.1%} MFU"
        return f"{self.step_s * 1e3:,.1f} ms a step{mfu}, peak {self.peak_bytes / 2**30:.2f} GiB"


def run(bench: Bench) -> Iterator[Check]:
    yield from step(bench, bench.config())
    yield from attention(bench)


def step(bench: Bench, config: RunConfig) -> Iterator[Check]:
    """The step that a run makes; nothing of it is held afterwards."""
    with stage_folder(bench) as folder, ExitStack() as stack:
        steps = Steps(config, bench.process, made_up(bench, config, folder), stack)
        base = timed(bench, steps)
        bench.found["step_s"] = base.step_s
        yield noted("step", f"{steps.batch}; {'; '.join(steps.messages)}")
        yield bounded("compiler", base.compile_s, None, COMPILE_S if bench.on_cuda else None, "s")
        yield speed(bench, base)
        yield memory(bench, config, base)
        count, breaks = graphs(), graph_breaks()
        right = breaks == 0 and count in (1, 2)
        yield correct("graphs after all steps", right, f"{count}, {breaks} breaks", "1 or 2, 0 breaks")
        waited = steps.loader.wait_s / (steps.state.step * base.step_s)
        yield bounded("waiting for data", 100 * waited, None, 1.0 if bench.on_cuda else None, "% of a step", 2)
        yield from profile(bench, steps)


def timed(bench: Bench, steps: Steps) -> Timed:
    first_s = wall_seconds(bench.device, steps.step)
    loss = steps.step().item()
    count = 2 if bench.tiny else STEPS
    step_s = wall_seconds(bench.device, lambda: steps.losses(count)) / count
    peak_flops = bench.card and bench.card.peak_flops
    flops = flops_per_token(steps.config.model) * steps.batch.batch_tokens
    mfu = flops / step_s / peak_flops if peak_flops else None
    return Timed(first_s - step_s, step_s, mfu, peak_bytes(bench.device), loss)


def speed(bench: Bench, found: Timed) -> Check:
    if found.mfu is None:
        return noted("speed", str(found), step_s=found.step_s)
    bench.found["mfu"] = found.mfu
    least = LEAST * EXPECTED[bench.card.name] if bench.card.name in EXPECTED else EXPECTED_MFU[0]
    return bounded("MFU", 100 * found.mfu, 100 * least, None, "%", step_s=found.step_s)


def memory(bench: Bench, config: RunConfig, found: Timed) -> Check:
    """The peak against planning/memory_estimate.py's prediction; a CPU's resident set has this script in it too."""
    predicted = bench.predicted_bytes(config) / 2**30
    low, high = (LEAST * predicted, MOST_MEMORY * predicted) if bench.on_cuda else (None, None)
    return bounded("peak memory", found.peak_bytes / 2**30, low, high, "GiB", 2, predicted=predicted)


# -- where the time goes ----------------------------------------------------------------------------------------------


def profile(bench: Bench, steps: Steps) -> Iterator[Check]:
    """Five steps as `pretrain.py --profile` records them; the trace and the table are kept in --out."""
    run, messages = RunPaths(bench.work), []
    meter = SimpleNamespace(timed=lambda name: nullcontext())
    ctx = RunContext.create(steps.config, bench.process, run, messages.append)
    profiler = Profiler(ctx, steps.state.step, meter, enabled=True)
    for number in range(steps.state.step, profiler.window.stop):
        with profiler.around(number):
            steps.step(phase=profiler.phase)
    with (run.profile / TRACE).open("rb") as trace, gzip.open(bench.out / f"gpu_check_{TRACE}.gz", "wb") as kept:
        shutil.copyfileobj(trace, kept)
    shutil.copy(run.profile / TABLE, bench.out / f"gpu_check_{TABLE}")
    shares = shares_of(profiler.costs)
    yield noted("kernels", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()), **shares)


def shares_of(costs: list[Cost]) -> dict[str, float]:
    """Of all kernels' time, by kind of kernel, and by name for the costliest of the rest."""
    total = sum(cost.us for cost in costs) or 1.0
    sums: dict[str, float] = defaultdict(float)
    for cost in costs:
        name = cost.name.lower()
        kind = next((kind for kind, parts in GROUPS.items() if any(part in name for part in parts)), cost.name[:40])
        sums[kind] += cost.us / total
    return dict(sorted(sums.items(), key=lambda item: item[1], reverse=True)[:6])


# -- attention ---------------------------------------------------------------------------------------------------------


def attention(bench: Bench) -> Iterator[Check]:
    """cuDNN's output and gradients against FlashAttention-2's, for a whole micro-batch, and their times."""
    model = bench.model()
    sequences = 2 if bench.tiny else ATTENTION_TOKENS // model.max_seq_len
    ways = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if not bench.on_cuda:
        ways = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = 3, sequences, model.max_seq_len, model.n_heads, model.head_size  # as the projection leaves them
    heads = torch.randn(shape, generator=generator, device=bench.device).bfloat16()
    heads = [part.transpose(1, 2).requires_grad_() for part in heads]  # (B, H, T, K) each
    found: dict[str, list[Tensor]] = {}
    for name, backend in ways.items():
        with sdpa_kernel(backend):
            try:
                found[name] = output_and_gradients(heads)
                seconds = seconds_of(bench.device, lambda: output_and_gradients(heads), 2 if bench.tiny else 10)
            except RuntimeError as error:  # no such kernel for this card
                yield noted(f"attention by {name}", f"not here: {str(error).splitlines()[0][:120]}")
                continue
        yield noted(f"attention by {name}", f"{seconds * 1e3:,.2f} ms, forward and backward", seconds=seconds)
    if len(found) == len(ways):
        first, second = found.values()
        error = max(relative_error(a, b) for a, b in zip(first, second, strict=True))
        yield close(f"attention, {' against '.join(ways)}", error, ATTENTION_ERROR)


def output_and_gradients(heads: list[Tensor]) -> list[Tensor]:
    out = F.scaled_dot_product_attention(*heads, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, heads, torch.ones_like(out))]
