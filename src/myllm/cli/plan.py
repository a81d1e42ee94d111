"""Before a run: what it needs, predicted (`myllm plan`, `pretrain.py --dry-run`) or rehearsed (`myllm preflight`)."""

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from myllm.config import RunConfig
from myllm.distributed import launcher
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError, bullets
from myllm.formatting import format_duration
from myllm.planning.batch import batch_plan
from myllm.planning.flops import flops_per_token
from myllm.planning.forecast import Hardware, compare, describe, parse_hardware, predict
from myllm.planning.gpu_specs import gpu_from_device_name
from myllm.planning.length import length_note, resolve_max_steps
from myllm.presets import describe_settings

from .launch import RunArgs, parse_run_args

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
DRY_RUN_MFU = 0.4
"""Fraction of the speed of matrix products that a training step is expected to reach."""


@dataclass(frozen=True)
class PlanArgs(RunArgs):
    """Predict a run's memory by part, micro-batch, accumulation steps, time and cost. Nothing is measured.

    `myllm plan --table` prints the presets on common GPUs, as in docs/hardware.md.
    """

    gpus: tuple[str, ...] = ()
    """How many of which GPU: 8xA100-80, 1xRTX3060, H100, or cpu; an unknown name lists all. Several become a table."""
    dollars_per_hour: tuple[float, ...] = ()
    """Price of the machine, with all its GPUs: print the cost. One for each of --gpus."""


def plan(words: list[str]) -> None:
    """Predict memory, micro-batch, hours and cost of a run on given GPUs."""
    if words == ["--table"]:
        from myllm.planning.hardware_table import page

        print(page(), end="")
        return
    args = parse_run_args(PlanArgs, words, "myllm plan")
    if not args.gpus:
        raise UserError("missing --gpus, for example --gpus 8xA100-80 or --gpus cpu")
    if note := length_note(args.config, args.own_text):
        print(note)
    prices = args.dollars_per_hour
    for price in prices:
        check_limit("dollars_per_hour", price)
    if prices and len(prices) != len(args.gpus):
        raise UserError(f"{len(prices)} --dollars-per-hour for {len(args.gpus)} --gpus; give one for each")
    forecasts = [predict(args.config, parse_hardware(text)) for text in args.gpus]
    if len(forecasts) > 1:
        print(compare(forecasts, prices))
    else:
        print(describe(forecasts[0], dollars_per_hour=prices[0] if prices else None))


def check_limit(name: str, value: float) -> None:
    """Raises a UserError if a limit is not a positive number, or beyond what clocks count in."""
    if not 0 < value <= 1e9:
        raise UserError(f"--{name.replace('_', '-')} is {value}, but must be above 0 and at most 1e9")


def describe_dry_run(args: RunArgs) -> str:
    """The settings, the plan for this machine, and the data."""
    from myllm.distributed.collectives import choose_device
    from myllm.distributed.device_info import cuda_problem, device_name, has_triton

    device = choose_device(args.config.train.device)
    gpu = gpu_from_device_name(device_name(device)) if device.type == "cuda" else None
    hardware = Hardware(launcher.world_size(), gpu, device.type, has_triton(device))
    config, data_lines = _with_data(args)
    problem = cuda_problem() if args.config.train.device == "auto" and device.type == "cpu" else None
    return "\n".join(
        [
            f"{describe_settings(args.config)}\n",
            describe(predict(config, hardware), _measured_time(config, hardware.count, device)),
            *_memory_warning(config, device),
            *(f"data         {line}" for line in data_lines),
            *([f"no GPU       {problem}"] if problem else []),
        ]
    )


def check_prepared_data(config: RunConfig) -> None:
    """Reject a data set that is complete and does not suit the run, as training will.

    Raises:
        UserError: as `training.setup.check_data`.
    """
    from myllm.training.preflight.data_and_disk import find_prepared
    from myllm.training.setup import check_data

    dataset = find_prepared(config.data)
    if dataset is not None and dataset.complete:
        check_data(config, dataset, batch_plan(config, launcher.world_size()))


def _memory_warning(config: RunConfig, device: "torch.device") -> list[str]:
    """Not an error, as it is when the run starts: the plan may be for another machine."""
    from myllm.training.preflight.device_memory import check_memory

    try:
        check_memory(config, device, launcher.world_size())
    except UserError as error:
        return [f"memory       warning: {error}"]
    return []


def _with_data(args: RunArgs) -> tuple[RunConfig, list[str]]:
    """The config with the steps that follow from the size of its text, if that is known, and lines about the text."""
    from myllm.training.preflight.data_and_disk import inspect_data_and_disk

    config = args.config
    try:
        found = inspect_data_and_disk(config)
    except UserError as error:  # a plan is useful without the text
        return config, [str(error)]
    if not found.tokens:
        note = length_note(config, args.own_text)
        return config, [f"the number of tokens in {found.source} is not known yet", *([note] if note else [])]
    config = resolve_max_steps(config, found.tokens, args.own_text)
    return config, [found.source, *found.describe_length(config)]


def _measured_time(config: RunConfig, world_size: int, device: "torch.device") -> str:
    from myllm.distributed.device_info import device_name, measure_matmul_flops
    from myllm.distributed.precision import allow_tf32, compute_dtype, describe_precision

    precision, dtype = describe_precision(config.train.precision, device), compute_dtype(config.train.precision, device)
    with allow_tf32(config, device):
        rate = measure_matmul_flops(device, dtype) * world_size
    total = flops_per_token(config.model) * config.train.max_steps * config.train.batch_tokens
    return (
        f"time         about {format_duration(total / (DRY_RUN_MFU * rate))} on {world_size} x {device_name(device)}: "
        f"{DRY_RUN_MFU:.0%} of the {rate / 1e12:.2f} TFLOP/s just measured for matrix products in {precision}"
    )


@dataclass(frozen=True)
class PreflightArgs(RunArgs):
    """Rehearse a run before it starts: does it fit, how long does it take, what does it cost? Nothing is left behind,
    except that with --train.micro-batch-size auto the run uses the size that the preflight found.

    With several GPUs: torchrun --standalone --nproc_per_node=8 -m myllm preflight PRESET
    """

    max_hours: float | None = None
    """Fail if the rest of the run needs more hours."""
    dollars_per_hour: float | None = None
    """Price of all machines of the run together: print the cost of the rest of the run."""


def preflight(words: list[str]) -> None:
    """Rehearse a run: does it fit, how long will it take, what will it cost?"""
    args = parse_run_args(PreflightArgs, words, "myllm preflight")
    config = args.config
    for name in ("max_hours", "dollars_per_hour"):
        if (value := getattr(args, name)) is not None:
            check_limit(name, value)
    from myllm.data.prepare.background import check_data_names

    if launcher.local_rank() == 0:
        check_data_names(config.data)  # before the seconds that importing torch takes
    from myllm.distributed.collectives import process_group
    from myllm.training.preflight import rehearsal
    from myllm.training.preflight.batch_size import save_for_run
    from myllm.training.preflight.summary import Limits
    from myllm.training.stop_signals import raise_exit, signal_handler

    def say(line: str) -> None:
        if launcher.rank() == 0:
            print(f"preflight: {line} ...", flush=True)

    protect_output(keep_going=True)  # what runs next needs the result even if nobody reads the output
    limits = Limits(args.max_hours, args.dollars_per_hour)
    # A signal raises, so that the temporary folder is removed.
    with signal_handler(SIGNALS, raise_exit), process_group(config.train.device) as dist:
        result = rehearsal.preflight(config, dist, limits, say, own_text=args.own_text)
    if dist.is_rank_zero:
        print(result.table(), flush=True)
    if problems := result.problems():
        raise UserError(f"this run would fail:\n{bullets(problems)}")
    if config.train.micro_batch_size == "auto" and result.measured and dist.is_rank_zero:
        try:
            save_for_run(result.config, dist, result.measured.peak_bytes)
        except OSError as error:
            say(f"cannot save the micro-batch size; the run will search for it again: {error.strerror}")
