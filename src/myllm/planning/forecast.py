"""What a run needs on given hardware: memory, the largest micro-batch that fits, and time.

Everything follows from the config; nothing is measured or allocated. `myllm plan` takes GPUs by name, `--dry-run` the
machine it runs on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from myllm.config import RunConfig
from myllm.errors import UserError, did_you_mean
from myllm.formatting import format_gib, format_si, format_table

from .batch import batch_plan
from .disk import disk_estimate_bytes
from .flops import flops_per_token, parameters_by_part
from .gpu_specs import GPU_SPECS, GpuSpec, gpu_by_name
from .length import decay_note, warmup_note
from .memory_estimate import HEADROOM, ComputeMode, memory_by_part, predicted_bytes

GIB = 2**30
DRIVER_FRACTION = 0.02
"""Of a GPU's memory, reserved by the driver: torch sees 11.76 of 12 GiB on an RTX 3060, and 79.1 of 80 on an H100."""
CONTEXT_BYTES = 0.6 * GIB
"""The CUDA context with torch's kernels, outside torch's allocator: usually 0.4 to 0.6 GiB. Not measured here."""
NCCL_BYTES = 0.5 * GIB
"""NCCL's buffers with several ranks. A guess, not measured here."""
CPU_TOKENS = 4_096
"""Of a micro-batch. A CPU gains nothing from more (docs/experiments.md), and has memory for far more."""
MPS_TOKENS = 32_766
"""Of a micro-batch. The gradient of a weight is a sum over these tokens, and on M1 and M2 longer sums include other
memory: before torch 2.14 in all matrix products, later in some (pytorch/pytorch#195163)."""
EXPECTED_MFU = (0.30, 0.50)
"""Fraction of the GPU's bfloat16 peak that compiled models of 50M to 1B parameters reach. From published runs with the
same FLOP count (6 N + 12 n_layers d_model T), as of March 2026: on H100 nanochat d16 37 % and d24 50.0 % (8 GPUs; its
66 % is with fp8), llm.c 124M 41 % and 350M 46 % (8 GPUs), autoresearch's 50M 39.8 % (1 GPU); on A100 LF_LLM-269M 32 %
(8 GPUs, December 2024), TinyLlama 52 %, llm.c, hand-written CUDA, 60 to 64 % (8 GPUs). Hundreds of GPUs reach less:
SmolLM3 3B 29 % on 384 H100. This project's own is not measured on a GPU yet; docs/speed.md estimates it."""


@dataclass(frozen=True)
class Hardware:
    """The devices of a run, all alike."""

    count: int
    gpu: GpuSpec | None = None
    """None: a CPU, or a GPU that is not in the table."""
    device: str = "cpu"
    """torch's type of device."""
    triton: bool = True
    """torch.compile works on the GPU (`device_info.has_triton`)."""

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name if self.gpu else self.device.upper()}"

    @property
    def budget_bytes(self) -> int | None:
        """Memory for torch's allocator on one GPU, minus headroom. None: unknown."""
        if self.gpu is None:
            return None
        overhead = CONTEXT_BYTES + (NCCL_BYTES if self.count > 1 else 0)
        return int((self.gpu.memory_gib * GIB * (1 - DRIVER_FRACTION) - overhead) * (1 - HEADROOM))


def parse_hardware(text: str) -> Hardware:
    """8xA100-80, 1xRTX3060, H100 (one of them), or cpu.

    Raises:
        UserError: an unknown GPU; lists the known ones.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(.+)", text.strip(), re.IGNORECASE)
    count, name = (int(found[1] or 1), found[2]) if found else (1, text)
    gpu = gpu_by_name(name)
    if count >= 1 and (gpu or name.lower() == "cpu"):
        return Hardware(count, gpu, "cuda" if gpu else "cpu")
    known = [gpu.name for gpu in GPU_SPECS]
    variants = [kind for kind in known if re.match(rf"{re.escape(name)}[^a-z0-9]", kind, re.IGNORECASE)]
    if gpu is None and variants:
        raise UserError(f"--gpus {text!r} matches several GPUs: {', '.join(variants)}; choose one of them")
    raise UserError(
        f"--gpus {text!r}: expected a number and a GPU, such as 8xA100-80 or 1xRTX3060, or cpu"
        f"{did_you_mean(name, known)}; known GPUs: {', '.join(known)}"
    )


@dataclass(frozen=True)
class Forecast:
    """A run on some hardware."""

    config: RunConfig
    """With the configured micro-batch."""
    hardware: Hardware
    largest: int | None
    """The largest micro-batch size that fits. None: not one sequence fits, or the memory is unknown."""

    @property
    def mode(self) -> ComputeMode:
        return ComputeMode.of(self.config, self.hardware.device, self.hardware.count, self.hardware.triton)

    @property
    def fitted_config(self) -> RunConfig:
        """The config with the largest micro-batch, or with one sequence if `largest` is None."""
        return with_micro_batch_size(self.config, self.largest or 1)

    @property
    def run_config(self) -> RunConfig:
        """The config with the micro-batch that the run uses: as set; with auto, the largest that fits; one that fits in
        place of one that does not divide the batch, which no run accepts."""
        size = self.config.train.micro_batch_size
        if size in batch_plan(self.config, self.hardware.count).micro_batch_sizes():
            return self.config
        if size == "auto" and self.hardware.device == "cpu":
            return with_micro_batch_size(self.config, candidate_sizes(self.config, self.hardware.count, "cpu")[-1])
        return self.fitted_config

    @property
    def configured_batch_fits(self) -> bool:
        """True if the configured micro-batch fits and divides the batch."""
        size = self.config.train.micro_batch_size
        divides = size in batch_plan(self.config, self.hardware.count).micro_batch_sizes()
        return size != "auto" and divides and self.largest is not None and size <= self.largest

    @property
    def step_s(self) -> tuple[float, float] | None:
        """Seconds per step at the upper and the lower end of EXPECTED_MFU. None: the GPU's peak is unknown."""
        peak = self.hardware.gpu and self.hardware.gpu.peak_flops
        if not peak:
            return None
        # Recomputing the forward pass is a third more arithmetic.
        work: float = flops_per_token(self.config.model) * self.config.train.batch_tokens
        work *= 4 / 3 if self.config.train.activation_checkpointing else 1
        low, high = EXPECTED_MFU
        return work / (peak * self.hardware.count * high), work / (peak * self.hardware.count * low)

    @property
    def tokens_per_s(self) -> tuple[float, float] | None:
        """The lower figure first."""
        batch = self.config.train.batch_tokens
        return self.step_s and (batch / self.step_s[1], batch / self.step_s[0])

    @property
    def hours(self) -> tuple[float, float] | None:
        """Of training alone, without evaluations and saves."""
        steps = self.config.train.max_steps
        return self.step_s and (self.step_s[0] * steps / 3_600, self.step_s[1] * steps / 3_600)


def predict(config: RunConfig, hardware: Hardware) -> Forecast:
    """
    Raises:
        UserError: train.batch_tokens does not divide over the ranks.
    """
    batch = batch_plan(config, hardware.count)
    sizes = batch.micro_batch_sizes()
    if not sizes:
        raise UserError(f"on {hardware.count} ranks {batch.error()}")
    forecast, budget = Forecast(config, hardware, None), hardware.budget_bytes
    if budget is None:
        return forecast
    fitting = (n for n in sizes if predicted_bytes(with_micro_batch_size(config, n), forecast.mode) <= budget)
    return replace(forecast, largest=max(fitting, default=None))


def candidate_sizes(config: RunConfig, world_size: int, device: str, val_tokens: int | None = None) -> list[int]:
    """What train.micro_batch_size auto chooses from, ascending: every size that divides the batch and is not larger
    than the validation data, if that is known."""
    sizes, seq_len = batch_plan(config, world_size).micro_batch_sizes(), config.model.max_seq_len
    limit = (sizes[-1] if val_tokens is None else (val_tokens - 1) // seq_len) * seq_len
    limit = min(limit, {"cpu": CPU_TOKENS, "mps": MPS_TOKENS}.get(device, limit))
    return [size for size in sizes if size * seq_len <= limit] or sizes[:1]


def with_micro_batch_size(config: RunConfig, size: int) -> RunConfig:
    return replace(config, train=replace(config.train, micro_batch_size=size))


# -- as text ----------------------------------------------------------------------------------------------------------


def describe(forecast: Forecast, measured_time: str | None = None, dollars_per_hour: float | None = None) -> str:
    """The plan of a run: batch, parameters, memory by part, disk, time and cost.

    Args:
        measured_time: in place of the time that follows from the GPU's peak.
        dollars_per_hour: price of all GPUs together; None: no cost.
    """
    config, hardware, mode = forecast.config, forecast.hardware, forecast.mode
    configured, shown = config.train.micro_batch_size, forecast.run_config
    kind = "one process" if hardware.count == 1 else "FSDP" if mode.sharded else "DDP"
    checkpointing = ", activation checkpointing" * config.train.activation_checkpointing
    return "\n".join(
        [
            f"run          {config.name} on {hardware} ({kind}{checkpointing})",
            f"batch        {batch_plan(shown, hardware.count)}",
            *([_auto_line(forecast)] if configured == "auto" and hardware.gpu is None else []),
            *_size_lines(config),
            *_memory_lines(shown, mode),
            *(_fit_lines(forecast) if hardware.gpu else []),
            "disk         (estimate)",
            *(f"  {name:<30}{format_gib(size):>12}" for name, size in disk_estimate_bytes(config).items()),
            *([measured_time] if measured_time else _time_lines(forecast)),
            *([_cost_line(forecast, dollars_per_hour)] if dollars_per_hour else []),
        ]
    )


def compare(forecasts: Sequence[Forecast], dollars_per_hour: Sequence[float]) -> str:
    """A table of one run on several machines: memory and time and, if the machines' prices are given, cost."""
    rows = [("GPUs", "micro-batch", "peak memory", "tokens/s", "hours", *(["cost"] if dollars_per_hour else []))]
    for index, forecast in enumerate(forecasts):
        run, hardware = forecast.run_config, forecast.hardware
        size, largest = run.train.micro_batch_size, forecast.largest
        advice = f"{largest} fits" if largest else "not even 1 fits"
        too_large = hardware.gpu is not None and size not in range((largest or 0) + 1)
        ranges = [
            "unknown" if found is None else " to ".join(map(spell, found))
            for found, spell in ((forecast.tokens_per_s, format_si), (forecast.hours, "{:,.1f}".format))
        ]
        price = dollars_per_hour[index : index + 1]
        cost = [_cost(forecast, price[0])] if price else []
        peak = format_gib(predicted_bytes(run, forecast.mode))
        rows.append((str(hardware), f"{size} (too large: {advice})" if too_large else str(size), peak, *ranges, *cost))
    return format_table(rows)


def _cost(forecast: Forecast, dollars_per_hour: float) -> str:
    if forecast.hours is None:
        return "unknown"
    return " to ".join(f"${hours * dollars_per_hour:,.2f}" for hours in forecast.hours)


def _cost_line(forecast: Forecast, dollars_per_hour: float) -> str:
    return f"cost         {_cost(forecast, dollars_per_hour)} for these hours, at ${dollars_per_hour:,.2f} per hour"


def _auto_line(forecast: Forecast) -> str:
    config, hardware = forecast.config, forecast.hardware
    sizes = ", ".join(map(str, candidate_sizes(config, hardware.count, hardware.device)))
    return (
        f"             auto: training takes the largest micro-batch that fits of {sizes}; the memory below is for "
        f"{forecast.run_config.train.micro_batch_size}"
    )


def _size_lines(config: RunConfig) -> list[str]:
    model, train = config.model, config.train
    tokens, flops = train.max_steps * train.batch_tokens, flops_per_token(model)
    parts, notes = parameters_by_part(model), (warmup_note(config), decay_note(config))
    total = sum(parts.values())
    return [
        f"steps        {train.max_steps:,} steps = {tokens:,} tokens",
        *(f"             {note}" for note in notes if note),
        f"parameters   {total:,} in all, {total - parts['embedding']:,} without the embedding",
        *(f"  {name:<16}{count:>13,}" for name, count in parts.items() if count),
        f"vocabulary   {model.vocab_size:,} tokens, padded to {model.padded_vocab_size:,} rows",
        f"FLOPs        {flops / 1e9:.3f} G per token, {flops * tokens:.3e} in all",
    ]


def _memory_lines(config: RunConfig, mode: ComputeMode) -> list[str]:
    """The predicted peak of one rank by part."""
    parts = memory_by_part(config, mode)
    kind = "resident memory of the process" if mode.device == "cpu" else "torch's allocator"
    return [
        f"memory       {format_gib(sum(parts.values()))} predicted peak of one rank ({kind})",
        *(f"  {name:<30}{format_gib(size):>12}" for name, size in parts.items()),
    ]


def _fit_lines(forecast: Forecast) -> list[str]:
    config, hardware, largest = forecast.config, forecast.hardware, forecast.largest
    gpu, configured, several = hardware.gpu, config.train.micro_batch_size, hardware.count > 1
    budget = hardware.budget_bytes
    assert gpu is not None, "only a known GPU has a memory to fit in"
    assert budget is not None
    lines = [
        f"precision    {_precision(config, gpu)}",
        f"GPU          {gpu.memory_gib:g} GiB, of which {format_gib(budget)} can be used: minus the "
        f"driver, the CUDA context{', NCCL' if several else ''} and {HEADROOM * 100:.0f} % of headroom",
    ]
    if largest is None:
        lines += [
            "fits         no: one sequence is too much",
            "advice       lower model.max_seq_len, model.n_layers or model.d_model, or try "
            "--train.activation-checkpointing" + (" or --train.parallel fsdp" if several else ""),
        ]
    elif configured == "auto":
        lines.append(f"micro-batch  auto: {largest}, the largest that is predicted to fit; the run tries it first")
    elif configured == largest:
        lines.append(f"micro-batch  {largest}, as set, is the largest that fits and divides the batch")
    else:
        divides = configured in batch_plan(config, hardware.count).micro_batch_sizes()
        reason = "does not fit" if divides else "does not divide the batch"
        verdict = "fits" if forecast.configured_batch_fits else reason
        lines.append(
            f"micro-batch  {configured}, as set, {verdict}; the largest that fits is {largest}: "
            f"--train.micro-batch-size {largest}, or auto"
        )
    return lines


def _precision(config: RunConfig, gpu: GpuSpec) -> str:
    configured = config.train.precision
    dtype = gpu.half if configured == "auto" else configured
    if dtype == "bfloat16" and gpu.half == "float16":
        return f"bfloat16, which a {gpu.name} cannot compute in: leave train.precision at auto"
    return dtype + " with a loss scale" * (dtype == "float16")


def _time_lines(forecast: Forecast) -> Sequence[str]:
    gpu = forecast.hardware.gpu
    if gpu is None:
        return ["time         unknown for a CPU: `pretrain.py PRESET --dry-run` measures this machine"]
    step, rates, hours = forecast.step_s, forecast.tokens_per_s, forecast.hours
    if step is None or rates is None or hours is None:
        return [f"time         unknown: no {gpu.half} peak is known for a {gpu.name}"]
    (fast, slow), (low, high), (shortest, longest) = step, rates, hours
    mfu = " to ".join(f"{fraction * 100:.0f} %" for fraction in EXPECTED_MFU)
    lines = [
        f"step         {fast:.3g} to {slow:.3g} s, {low:,.0f} to {high:,.0f} tokens/s",
        f"time         {shortest:,.1f} to {longest:,.1f} hours of training, without evaluations and saves",
        f"             assuming {mfu} of {gpu.tflops:g} TFLOP/s per GPU in {gpu.half}, as published runs of this size "
        "reach; not measured here",
    ]
    if not forecast.mode.compiled:
        lines.append("             slower with train.compile off")
    return lines
