"""train.micro_batch_size auto: the largest micro-batch that the memory holds, found by trial."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from myllm import paths
from myllm.config import RunConfig, saved_config, to_dict
from myllm.data.dataset import Dataset
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.errors import UserError
from myllm.files import write_json
from myllm.paths import RunPaths
from myllm.planning.batch import micro_batch_sizes
from myllm.planning.memory_estimate import ComputeMode, predicted_bytes
from myllm.runs.history import read_config, read_json_or_empty

from .rehearsal import measure_peak_bytes, memory_limit_bytes, scratch_folder, synthetic_dataset

CPU_TOKENS = 4_096
"""A CPU gains nothing from micro-batches of more tokens (docs/experiments.md), and has memory for far larger ones."""


def largest_that_fits(sizes: list[int], measure: Callable[[int], int | None], limit_bytes: int) -> int | None:
    """The largest micro-batch size within the limit, or None if the smallest is beyond it.

    Memory is a straight line over the size, so two trials say where the limit lies, and the next ones prove it. No
    trial is made of a size that the line puts beyond the limit, which on a CPU would end the process.

    Args:
        sizes: ascending.
        measure: peak bytes with a size, or None where it does not fit.
    """
    found: list[tuple[int, int]] = []  # sizes that fit, ascending, and their bytes
    left = list(sizes)
    while left:
        size = _next_to_try(left, found, limit_bytes)
        if size is None:
            break
        peak = measure(size)
        fits = peak is not None and peak <= limit_bytes
        if fits:
            found.append((size, peak))
        left = [other for other in left if (other > size if fits else other < size)]
    return found[-1][0] if found else None


def _next_to_try(left: list[int], found: list[tuple[int, int]], limit_bytes: int) -> int | None:
    if len(found) < 2:
        return left[0]
    (a, a_bytes), (b, b_bytes) = found[-2:]
    slope = max(b_bytes - a_bytes, 0) / (b - a)
    return max((size for size in left if b_bytes + slope * (size - b) <= limit_bytes), default=None)


def candidate_sizes(config: RunConfig, process: DistContext, val_tokens: int | None = None) -> list[int]:
    """Every size that keeps batch_tokens exact and the held-out text, if that is known, has a batch for."""
    sizes, seq_len = micro_batch_sizes(config, process.world_size), config.model.max_seq_len
    most = (sizes[-1] if val_tokens is None else (val_tokens - 1) // seq_len) * seq_len
    if process.device.type == "cpu":
        most = min(most, CPU_TOKENS)
    return [size for size in sizes if size * seq_len <= most] or sizes[:1]


def is_safe_to_try(config: RunConfig, process: DistContext, size: int, limit_bytes: int) -> bool:
    """Whether a trial of a size is safe. A CPU ends a process that takes too much memory, so there the estimate must
    fit first; elsewhere trying is free."""
    how = ComputeMode.of(config, process.device.type, process.world_size)
    return process.device.type != "cpu" or predicted_bytes(_with(config, size), how) <= limit_bytes


def memory_probe(
    config: RunConfig, dataset: Dataset, process: DistContext, limit_bytes: int
) -> Callable[[int], int | None]:
    """What `largest_that_fits` measures with: real steps on this device."""

    def measure(size: int) -> int | None:
        if not is_safe_to_try(config, process, size, limit_bytes):
            return None
        return measure_peak_bytes(config, dataset, process, size, limit_bytes)

    return measure


def resolve_micro_batch_size(
    config: RunConfig,
    tokenizer: Tokenizer,
    process: DistContext,
    val_tokens: int | None = None,
    limit_bytes: int | None = None,
    rehearsed: bool = False,
) -> tuple[RunConfig, str]:
    """The config with a number for "auto", the same on all ranks, and a line that says why; any other as it is.

    A run that has begun keeps its number. Where the ranks, the device or the settings have changed since, the number
    is tried first, and replaced only if it no longer divides or fits. A run that begins takes the number of its
    preflight untried, if that was for the same ranks, device and settings and what it needed is there.

    Args:
        val_tokens: held out, where that is known: a micro-batch of validation is never larger.
        limit_bytes: memory of one rank that may be used; None: what there is, less headroom.
        rehearsed: whether a preflight's number may be taken; a preflight itself finds its own.

    Raises:
        UserError: not even one sequence fits.
    """
    if config.train.micro_batch_size != "auto":
        return config, ""
    sizes = candidate_sizes(config, process, val_tokens)
    before, same = distributed.broadcast_object(_of_this_run(config, process) if process.is_rank_zero else None)
    if before in micro_batch_sizes(config, process.world_size) and same:
        return _with(config, before), f"train.micro_batch_size auto: {before}, as this run began"
    limit_bytes = memory_limit_bytes(process) if limit_bytes is None else limit_bytes
    size, peak = distributed.broadcast_object(
        _of_preflight(config, process) if process.is_rank_zero and rehearsed else (None, 0)
    )
    if size in sizes and peak <= limit_bytes:
        needed = f"{peak / 2**30:.2f} of {limit_bytes / 2**30:.2f} GiB a rank"
        return _with(config, size), f"train.micro_batch_size auto: {size}, as the preflight found it, in {needed}"
    with scratch_folder(process) as folder:
        dataset = synthetic_dataset(config, folder, tokenizer, process)
        measure = memory_probe(config, dataset, process, limit_bytes)
        kept = before in sizes and measure(before) is not None
        size = before if kept else largest_that_fits(sizes, measure, limit_bytes)
    if size is None:
        raise UserError(nothing_fits_message(config, limit_bytes))
    why = "as this run began" if kept else f"the largest of {', '.join(map(str, sizes))} that fits"
    return _with(config, size), f"train.micro_batch_size auto: {size}, {why} in {limit_bytes / 2**30:.2f} GiB a rank"


def nothing_fits_message(config: RunConfig, limit_bytes: int) -> str:
    return (
        f"out of memory: not even one sequence of model.max_seq_len {config.model.max_seq_len:,} fits in the "
        f"{limit_bytes / 2**30:.2f} GiB that one rank may use; lower model.max_seq_len, model.n_layers or model.d_model"
    )


def _with(config: RunConfig, size: int) -> RunConfig:
    return replace(config, train=replace(config.train, micro_batch_size=size))


def _of_this_run(config: RunConfig, process: DistContext) -> tuple[int | None, bool]:
    """The number that a run of this name has in its config.json, and whether all that it depends on is the same."""
    run = RunPaths.of(config.name)
    saved, environment = read_config(run.config), read_json_or_empty(run.environment)
    train = saved.get("train")
    size = train.get("micro_batch_size") if isinstance(train, dict) else None
    if config.train.fresh or not isinstance(size, int):
        return None, False
    here = {"device_name": device_name(process.device), "world_size": process.world_size}
    before = to_dict(saved_config(saved, run.config))
    same = here == {key: environment.get(key) for key in here} and _costs(before) == _costs(to_dict(config))
    return size, same


def save_for_run(config: RunConfig, process: DistContext, peak_bytes: int) -> None:
    """Leave the number that a preflight settled on, with all that it depends on, for the run to take.

    Raises:
        OSError: it cannot be written.
    """
    file = paths.micro_batch_file(config.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"micro_batch_size": config.train.micro_batch_size, "peak_bytes": peak_bytes}
    write_json(file, found | _conditions(config, process))


def _of_preflight(config: RunConfig, process: DistContext) -> tuple[int | None, int]:
    """The number that a preflight left for just this run, and the bytes that it took; None if there is none."""
    left = read_json_or_empty(paths.micro_batch_file(config.name))
    size, peak = left.pop("micro_batch_size", None), left.pop("peak_bytes", None)
    fits = type(size) is int and type(peak) is int and left == _conditions(config, process)
    return (size, peak) if fits else (None, 0)


def _conditions(config: RunConfig, process: DistContext) -> dict[str, Any]:
    """What the memory that a number takes depends on, as JSON has it."""
    machine = {"device_name": device_name(process.device), "world_size": process.world_size}
    return {**machine, "torch": torch.__version__, **_costs(to_dict(config))}


def _costs(config: dict[str, Any]) -> dict[str, Any]:
    """What a step's memory depends on, with a little more."""
    passing = ("max_steps", "micro_batch_size", "fresh", "seed", "keep_last")
    train = {key: value for key, value in config["train"].items() if not key.endswith("_steps") and key not in passing}
    return {"model": config.get("model"), "train": train}
