"""train.micro_batch_size auto: the largest micro-batch that fits in memory, by trial."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from myllm import paths
from myllm.config import InitConfig, RunConfig, saved_config, to_dict
from myllm.data.dataset import Dataset
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.errors import UserError
from myllm.files import write_json
from myllm.formatting import format_gib
from myllm.paths import RunPaths
from myllm.planning.batch import batch_plan
from myllm.planning.forecast import candidate_sizes, with_micro_batch_size
from myllm.planning.memory_estimate import ComputeMode, predicted_bytes
from myllm.runs.history import read_json_or_empty, section
from myllm.training.setup import RunContext, build
from myllm.training.step import train_step

from .device_memory import OutOfMemory, memory_limit_bytes, reset_peak, run_within_memory
from .scratch import random_dataset, reset_compiler, scratch_folder

MEMORY_ACCUM_STEPS = 2
"""With two accumulation steps, a step holds everything in memory that it ever holds."""
IRRELEVANT_SETTINGS = ("max_steps", "micro_batch_size", "fresh", "seed", "keep_last")
"""Settings of `train` that memory does not depend on, beside those in ..._steps."""


def resolve_micro_batch_size(
    config: RunConfig,
    tokenizer: Tokenizer,
    dist: DistContext,
    val_tokens: int | None = None,
    limit_bytes: int | None = None,
    use_preflight: bool = False,
) -> tuple[RunConfig, str]:
    """The config with a number in place of "auto", the same on all ranks, and a sentence that explains it.

    A run keeps the number it began with. If ranks, device or settings have changed since, the number is tried first,
    and replaced only if it no longer divides the batch or no longer fits. A new run takes the number of its preflight
    without a trial, if that had the same ranks, device and settings and enough memory is available.

    Args:
        val_tokens: validation tokens, if known: they limit the micro-batch too.
        limit_bytes: memory that one rank may use; None: what is available, minus headroom.
        use_preflight: accept the number of a preflight.

    Raises:
        UserError: not even one sequence fits.
    """
    if config.train.micro_batch_size != "auto":
        return config, ""
    sizes = candidate_sizes(config, dist.world_size, dist.device.type, val_tokens)
    earlier, unchanged = distributed.broadcast_object(_size_of_run(config, dist) if dist.is_rank_zero else None)
    if unchanged and earlier in batch_plan(config, dist.world_size).micro_batch_sizes():
        return _resolved(config, earlier, "as this run began")
    limit_bytes = memory_limit_bytes(dist) if limit_bytes is None else limit_bytes
    found = _size_of_preflight(config, dist) if dist.is_rank_zero and use_preflight else (None, 0)
    size, peak = distributed.broadcast_object(found)
    if size in sizes and peak <= limit_bytes:
        memory = f"{format_gib(peak)} of {format_gib(limit_bytes)} per rank"
        return _resolved(config, size, f"from the preflight, which used {memory}")
    with scratch_folder(dist) as folder:
        dataset = random_dataset(config, folder, tokenizer, dist)
        probe = memory_probe(config, dataset, dist, limit_bytes)
        if earlier in sizes and probe(earlier) is not None:
            size, reason = earlier, "as this run began, and it fits"
        else:
            size = largest_that_fits(sizes, probe, limit_bytes)
            reason = f"the largest of {', '.join(map(str, sizes))} that fits"
    if size is None:
        raise UserError(nothing_fits_message(config, limit_bytes))
    return _resolved(config, size, f"{reason} in {format_gib(limit_bytes)} per rank")


def _resolved(config: RunConfig, size: int, reason: str) -> tuple[RunConfig, str]:
    return with_micro_batch_size(config, size), f"train.micro_batch_size auto: {size}, {reason}"


def nothing_fits_message(config: RunConfig, limit_bytes: int) -> str:
    return (
        f"out of memory: not even one sequence of model.max_seq_len {config.model.max_seq_len:,} fits in the "
        f"{format_gib(limit_bytes)} that one rank may use; lower model.max_seq_len, model.n_layers or model.d_model"
    )


# -- trials -----------------------------------------------------------------------------------------------------------


def largest_that_fits(sizes: list[int], measure: Callable[[int], int | None], limit_bytes: int) -> int | None:
    """The largest micro-batch size within the limit. None: the smallest exceeds it.

    Memory is linear in the size, so two trials show where the limit is, and the next ones verify it. Sizes beyond the
    limit on that line are never tried: on a CPU that would kill the process.

    Args:
        sizes: ascending.
        measure: peak bytes of a size; None if it does not fit.
    """
    fitting: list[tuple[int, int]] = []  # sizes and their bytes, ascending
    untried = list(sizes)
    while untried and (size := _next_to_try(untried, fitting, limit_bytes)) is not None:
        peak = measure(size)
        if peak is not None and peak <= limit_bytes:
            fitting.append((size, peak))
            untried = [other for other in untried if other > size]
        else:
            untried = [other for other in untried if other < size]
    return fitting[-1][0] if fitting else None


def _next_to_try(untried: list[int], fitting: list[tuple[int, int]], limit_bytes: int) -> int | None:
    if len(fitting) < 2:
        return untried[0]
    (a, a_bytes), (b, b_bytes) = fitting[-2:]
    slope = max(b_bytes - a_bytes, 0) / (b - a)
    return max((size for size in untried if b_bytes + slope * (size - b) <= limit_bytes), default=None)


def is_safe_to_try(config: RunConfig, dist: DistContext, size: int, limit_bytes: int) -> bool:
    """True if a trial cannot kill the process. A CPU kills a process that takes too much memory, so there the estimate
    must fit first; other devices refuse the memory."""
    mode = ComputeMode.of(config, dist.device.type, dist.world_size)
    return dist.device.type != "cpu" or predicted_bytes(with_micro_batch_size(config, size), mode) <= limit_bytes


def memory_probe(
    config: RunConfig, dataset: Dataset, dist: DistContext, limit_bytes: int
) -> Callable[[int], int | None]:
    """For `largest_that_fits`: measures real steps on this device."""

    def probe(size: int) -> int | None:
        if not is_safe_to_try(config, dist, size, limit_bytes):
            return None
        return measure_peak_bytes(with_micro_batch_size(config, size), dataset, dist, limit_bytes)

    return probe


def measure_peak_bytes(config: RunConfig, dataset: Dataset, dist: DistContext, limit_bytes: int) -> int | None:
    """Peak bytes of two real steps, on the rank that used most. None: they do not fit."""
    batch = batch_plan(config, dist.world_size).with_max_accum_steps(MEMORY_ACCUM_STEPS)
    config = replace(config, init=InitConfig())  # which weights they are does not matter
    ctx = RunContext.create(config, dist, RunPaths(dataset.folder.parent / "run"), log=lambda line: None)

    def two_steps() -> None:
        with build(ctx, dataset, batch) as (trainer, state):
            for step in range(2):  # in the second one, AdamW's moments exist beside the activations
                trainer.guard.record(replace(state, step=step))
                loss, *_ = train_step(trainer, step)
                loss.item()  # waits for the device, and raises its error here

    try:
        return run_within_memory(two_steps, dist, limit_bytes)[1]
    except OutOfMemory:
        return None
    finally:
        reset_compiler()
        reset_peak(dist.device)


# -- results of earlier trials ----------------------------------------------------------------------------------------


def _size_of_run(config: RunConfig, dist: DistContext) -> tuple[int | None, bool]:
    """The number in the config.json of this run, and whether everything that memory depends on is unchanged."""
    run = RunPaths.of(config.name)
    saved, environment = read_json_or_empty(run.config), read_json_or_empty(run.environment)
    size = section(saved, "train").get("micro_batch_size")
    if config.train.fresh or not isinstance(size, int):
        return None, False
    machine = _machine(dist)
    same_machine = machine == {key: environment.get(key) for key in machine}
    return size, same_machine and _settings(saved_config(saved, run.config)) == _settings(config)


def save_for_run(config: RunConfig, dist: DistContext, peak_bytes: int) -> None:
    """Save the number that a preflight chose, with everything that it depends on.

    Raises:
        OSError: the file cannot be written.
    """
    file = paths.micro_batch_file(config.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"micro_batch_size": config.train.micro_batch_size, "peak_bytes": peak_bytes}
    write_json(file, result | _conditions(config, dist))


def _size_of_preflight(config: RunConfig, dist: DistContext) -> tuple[int | None, int]:
    """The number that a preflight saved under the same conditions, and its peak in bytes. None: there is none."""
    saved = read_json_or_empty(paths.micro_batch_file(config.name))
    size, peak = saved.pop("micro_batch_size", None), saved.pop("peak_bytes", None)
    is_valid = type(size) is int and type(peak) is int and saved == _conditions(config, dist)
    return (size, peak) if is_valid else (None, 0)


def _conditions(config: RunConfig, dist: DistContext) -> dict[str, Any]:
    """What the memory of a step depends on, as JSON stores it."""
    return {**_machine(dist), "torch": torch.__version__, **_settings(config)}


def _machine(dist: DistContext) -> dict[str, Any]:
    return {"device_name": device_name(dist.device), "world_size": dist.world_size}


def _settings(config: RunConfig) -> dict[str, Any]:
    values = to_dict(config)
    train = {
        name: value
        for name, value in values["train"].items()
        if not name.endswith("_steps") and name not in IRRELEVANT_SETTINGS
    }
    return {"model": values["model"], "train": train}
