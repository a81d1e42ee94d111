"""What a run will take on given cards, before anybody rents them: does it fit, with which micro-batch, for how long?

Arithmetic only: nothing is measured or allocated, and no torch is needed. What it stands on is said with each figure.
"""

import re
from dataclasses import dataclass, replace

from myllm.config import RunConfig
from myllm.errors import UserError, did_you_mean

from .batch import batch_plan, micro_batch_sizes
from .disk import disk_estimate_bytes
from .flops import flops_per_token, n_parameters, parameters_by_part
from .gpu_specs import GPU_SPECS, GpuSpec, gpu_by_name
from .length import warmup_note
from .memory_estimate import HEADROOM, ComputeMode, memory_by_part, predicted_bytes

GIB = 2**30
DRIVER_SHARE = 0.02
"""Of a card's memory, what the driver keeps: torch sees 11.76 GiB of an RTX 3060's 12 and 79.1 of an H100's 80."""
CONTEXT_BYTES = 0.6 * GIB
"""CUDA's context with torch's kernels, outside torch's allocator: usually 0.4 to 0.6 GiB. Not measured here."""
NCCL_BYTES = 0.5 * GIB
"""Its buffers, where there are several ranks. A guess, not measured here."""
EXPECTED_MFU = (0.30, 0.50)
"""Of the card's peak in bfloat16, for compiled models of 50M to 1B parameters. From published runs in the same counting
(6 N + 12 n_layers d_model T), as they stood in March 2026: on H100 nanochat d16 37 % and d24 50.0 % (8 cards; its 66 %
is with fp8), llm.c 124M 41 % and 350M 46 % (8 cards), autoresearch's 50M 39.8 % (one card); on A100 LF_LLM-269M 32 %
(8 cards, December 2024), TinyLlama 52 %, llm.c, hand-written CUDA, 60 to 64 % (8 cards). Over hundreds of cards it is
less: SmolLM3 3B 29 % on 384 H100. This project's own is not measured on a GPU yet; docs/speed.md estimates it."""


@dataclass(frozen=True)
class Hardware:
    """The cards of a run, all alike; no card: a CPU."""

    count: int
    card: GpuSpec | None

    def __str__(self) -> str:
        return f"{self.count} x {self.card.name if self.card else 'CPU'}"

    @property
    def budget_bytes(self) -> int | None:
        """What torch's allocator may hold on one card, headroom left. None: a CPU has what the machine has."""
        if self.card is None:
            return None
        free = self.card.memory_gib * GIB * (1 - DRIVER_SHARE) - CONTEXT_BYTES - (NCCL_BYTES if self.count > 1 else 0)
        return int(free * (1 - HEADROOM))


def parse_hardware(text: str) -> Hardware:
    """8xA100-80, 1xRTX3060, H100 (one of them), or cpu.

    Raises:
        UserError: unknown, with the names that are known.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(.+)", text.strip(), re.IGNORECASE)
    count, name = (int(found[1] or 1), found[2]) if found else (1, text)
    card = gpu_by_name(name)
    if count < 1 or (card is None and name.lower() != "cpu"):
        known = [card.name for card in GPU_SPECS]
        variants = [kind for kind in known if re.match(rf"{re.escape(name)}[^a-z0-9]", kind, re.IGNORECASE)]
        if card is None and variants:
            raise UserError(f"--gpus {text!r}: several cards have that name: {', '.join(variants)}; give one of them")
        raise UserError(
            f"--gpus {text!r}: expected a number and a card such as 8xA100-80 or 1xRTX3060, or cpu"
            f"{did_you_mean(name, known)}; known cards: {', '.join(known)}"
        )
    return Hardware(count, card)


@dataclass(frozen=True)
class Forecast:
    """A run on some cards. `config` has the micro-batch that was asked for, `fits` the largest that fits."""

    config: RunConfig
    fleet: Hardware
    fits: int | None

    @property
    def how(self) -> ComputeMode:
        return ComputeMode.of(self.config, "cuda" if self.fleet.card else "cpu", self.fleet.count)

    @property
    def fitted_config(self) -> RunConfig:
        """The config with the largest micro-batch, or with one sequence where none fits."""
        return _with(self.config, self.fits or 1)

    @property
    def configured_batch_fits(self) -> bool:
        """Whether the micro-batch in the config fits and keeps the batch exact."""
        asked = self.config.train.micro_batch_size
        sizes = micro_batch_sizes(self.config, self.fleet.count)
        return asked in sizes and self.fits is not None and asked <= self.fits

    @property
    def step_s(self) -> tuple[float, float] | None:
        """Seconds a step, at the upper and lower end of what is expected; None where the card's peak is not known."""
        peak = self.fleet.card and self.fleet.card.peak_flops
        if not peak:
            return None
        # Recomputing a forward pass is a third more arithmetic, none of it the model's own.
        work = flops_per_token(self.config.model) * self.config.train.batch_tokens
        work *= 4 / 3 if self.config.train.activation_checkpointing else 1
        low, high = EXPECTED_MFU
        return work / (peak * self.fleet.count * high), work / (peak * self.fleet.count * low)

    @property
    def tokens_per_s(self) -> tuple[float, float] | None:
        """As `step_s`, the lower figure first."""
        return self.step_s and tuple(self.config.train.batch_tokens / seconds for seconds in reversed(self.step_s))

    @property
    def hours(self) -> tuple[float, float] | None:
        """Of training alone: evaluations and saves come on top."""
        return self.step_s and tuple(seconds * self.config.train.max_steps / 3_600 for seconds in self.step_s)


def predict(config: RunConfig, fleet: Hardware) -> Forecast:
    """
    Raises:
        UserError: train.batch_tokens cannot be cut over so many ranks at all.
    """
    sizes = micro_batch_sizes(config, fleet.count)
    if not sizes:
        fault = batch_plan(config, fleet.count).fault()
        raise UserError(f"on {fleet.count} ranks {fault}")
    how, budget = ComputeMode.of(config, "cuda" if fleet.card else "cpu", fleet.count), fleet.budget_bytes
    if budget is None:
        return Forecast(config, fleet, None)
    return Forecast(
        config, fleet, max((n for n in sizes if predicted_bytes(_with(config, n), how) <= budget), default=None)
    )


def _with(config: RunConfig, micro_batch_size: int) -> RunConfig:
    return replace(config, train=replace(config.train, micro_batch_size=micro_batch_size))


# -- for people -------------------------------------------------------------------------------------------------------


def format_forecast(forecast: Forecast) -> str:
    """Memory by part, the micro-batch, time, and what each figure stands on."""
    config, fleet, how = forecast.config, forecast.fleet, forecast.how
    asked = config.train.micro_batch_size
    shown = forecast.fitted_config if fleet.card or asked == "auto" else config
    kind = "alone" if fleet.count == 1 else "FSDP" if how.sharded else "DDP"
    lines = [
        f"{config.name} on {fleet} ({kind}{', activation checkpointing' * config.train.activation_checkpointing})",
        *_parameter_lines(config),
    ]
    if fleet.card and forecast.fits is None:
        lines.append("fits         no: one sequence is too much; predicted for one:")
    else:
        lines.append(f"batch        {batch_plan(shown, fleet.count)}")
    if fleet.card:
        lines.append(f"precision    {_precision(config, fleet.card)}")
    lines += memory_lines(shown, how)
    if fleet.budget_bytes is not None:
        lines += _fitting_lines(forecast)
    return "\n".join([*lines, *_time_lines(forecast)])


def _precision(config: RunConfig, card: GpuSpec) -> str:
    asked = config.train.precision
    dtype = card.half if asked == "auto" else asked
    if dtype == "bfloat16" and card.half == "float16":
        return f"bfloat16, for which a {card.name} has no arithmetic: leave train.precision at auto"
    return dtype + " with a loss scale" * (dtype == "float16")


def memory_lines(config: RunConfig, how: ComputeMode) -> list[str]:
    """The predicted peak of one rank by part."""
    parts = memory_by_part(config, how)
    what = "resident memory of the process" if how.device == "cpu" else "what torch's allocator holds"
    return [
        f"memory       {sum(parts.values()) / GIB:.2f} GiB predicted at the peak, one rank ({what})",
        *(f"  {name:<30}{size / GIB:>8.2f} GiB" for name, size in parts.items()),
    ]


def _fitting_lines(forecast: Forecast) -> list[str]:
    config, fleet, fits, asked = forecast.config, forecast.fleet, forecast.fits, forecast.config.train.micro_batch_size
    lines = [
        f"card         {fleet.card.memory_gib:g} GiB, of which {fleet.budget_bytes / GIB:.2f} may be used: driver, "
        f"CUDA's context{', NCCL' if fleet.count > 1 else ''} and {HEADROOM * 100:.0f} % of headroom are taken off"
    ]
    if fits is None:
        lines.append(
            "advice       lower model.max_seq_len, model.n_layers or model.d_model, or try "
            "--train.activation-checkpointing" + (" or --train.parallel fsdp" if fleet.count > 1 else "")
        )
    elif asked == "auto" or asked == fits:
        lines.append(f"micro-batch  {fits}, the largest that fits and divides the batch")
    else:
        divides = asked in micro_batch_sizes(config, fleet.count)
        fault = "does not fit" if divides else "does not divide the batch"
        why = "fits too" if forecast.configured_batch_fits else fault
        lines.append(
            f"micro-batch  {fits} is the largest that fits: --train.micro-batch-size {fits} ({asked}, as set, {why})"
        )
    return lines


def _time_lines(forecast: Forecast) -> list[str]:
    card = forecast.fleet.card
    if card is None:
        return ["time         not known for a CPU: `pretrain.py PRESET --dry-run` measures this one"]
    if forecast.step_s is None:
        return [f"time         not known: no {card.half} peak of a {card.name} is known"]
    fast, slow = forecast.step_s
    low, high = forecast.tokens_per_s
    shortest, longest = forecast.hours
    mfu = " to ".join(f"{share * 100:.0f} %" for share in EXPECTED_MFU)
    lines = [
        f"step         {fast:.3g} to {slow:.3g} s, {low:,.0f} to {high:,.0f} tokens/s",
        f"time         {shortest:,.1f} to {longest:,.1f} hours of training, evaluations and saves not included",
        f"             at {mfu} of {card.tflops:g} TFLOP/s a card in {card.half}, which published runs of this "
        "size reach; not measured here",
    ]
    if not forecast.how.compiled:
        lines.append("             with train.compile off it will be slower than that")
    return lines


def _parameter_lines(config: RunConfig) -> list[str]:
    tokens = config.train.max_steps * config.train.batch_tokens
    flops = flops_per_token(config.model)
    total = n_parameters(config.model)
    return [
        f"steps        {config.train.max_steps:,} steps = {tokens:,} tokens",
        *_warmup_lines(config),
        f"parameters   {total:,} in all",
        f"FLOPs        {flops / 1e9:.3f} G a token, {flops * tokens:.3e} in all",
    ]


def _warmup_lines(config: RunConfig) -> list[str]:
    note = warmup_note(config)
    return [f"             {note}"] if note else []


def describe_run(config: RunConfig, world_size: int, device: str = "cpu", triton: bool = True) -> str:
    """The arithmetic of a run as a text block for people: what `--dry-run` prints.

    Args:
        triton: as for `ComputeMode.of`.
    """
    model, train = config.model, config.train
    batch = str(batch_plan(config, world_size))
    if train.micro_batch_size == "auto":
        sizes = micro_batch_sizes(config, world_size)
        batch = f"auto: the most that fits of {', '.join(map(str, sizes))} sequences x {model.max_seq_len:,} tokens x "
        batch += f"{world_size} rank(s), accumulated to {train.batch_tokens:,} tokens a step"
        batch += "; memory is for one sequence"
        config = _with(config, 1)
    parts = parameters_by_part(model)
    total = sum(parts.values())
    tokens = train.max_steps * train.batch_tokens
    flops = flops_per_token(model)
    lines = [
        f"batch        {batch}",
        f"steps        {train.max_steps:,} steps = {tokens:,} tokens",
        *_warmup_lines(config),
        f"parameters   {total:,} in all, {total - parts['embedding']:,} without the embedding",
        *(f"  {name:<16}{count:>13,}" for name, count in parts.items() if count),
        f"vocabulary   {model.vocab_size:,} tokens, padded to {model.padded_vocab_size:,} rows",
        f"FLOPs        {flops / 1e9:.3f} G a token, {flops * tokens:.3e} in all",
        *memory_lines(config, ComputeMode.of(config, device, world_size, triton)),
        "disk         (estimate)",
        *(f"  {name:<30}{size / GIB:>8.2f} GiB" for name, size in disk_estimate_bytes(config).items()),
    ]
    return "\n".join(lines)
