"""A run in miniature: its own model, optimizer, steps and precision on made-up text, in a folder that goes away.

What a rehearsal does goes through the functions that the run itself uses, so that it costs what the run costs. It
leaves the random state as it found it, forgets what torch.compile learnt from it, and writes nowhere else.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from myllm import paths
from myllm.checkpoint.rng import get_rng_state, set_rng_state
from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig
from myllm.data.dataloader import BatchLoader
from myllm.data.dataset import FORMAT, MANIFEST, Dataset, Shard
from myllm.data.sampler import DataPosition
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed import launcher as ranks
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.distributed.parallelize import shard
from myllm.errors import UserError
from myllm.files import file_lock, file_sha256, write_json
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW
from myllm.planning.batch import BatchPlan, batch_plan
from myllm.planning.memory_estimate import HEADROOM
from myllm.training.context import RunContext
from myllm.training.gradient_guard import GradientGuard
from myllm.training.kernels import fast_kernels
from myllm.training.setup import Trainer
from myllm.training.step import train_step

from .device_memory import available_bytes, is_out_of_memory, memory_limit, peak_bytes, reset_peak

PREFIX = ".preflight-"
DOCUMENT_TOKENS = 256
HELLASWAG = "hellaswag.jsonl"
ALONE_S = 120.0
"""How long a rank that is out of memory waits for the others to be so too. A compiler may hold one back for a while."""


class OutOfMemory(Exception):
    """Of the device of one rank or more; every rank raises it."""


# -- a place that goes away -------------------------------------------------------------------------------------------


@contextmanager
def scratch_folder(process: DistContext) -> Iterator[Path]:
    """A temporary folder, the same on all ranks, on the disk that runs are on. Nothing outlasts the `with` block: not
    the folder, not the random state, not what torch.compile has learnt of shapes.

    A folder that a killed rehearsal left behind is removed by the next one.
    """
    before = get_rng_state(process.device)
    base = nearest_existing(paths.runs_dir())
    folder: Path | None = None
    if process.is_rank_zero:
        _remove_left_behind(base)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    folder = distributed.broadcast_object(folder)
    try:
        if not process.is_rank_zero:
            yield folder
        else:
            with file_lock(folder / ".lock"):
                yield folder
        distributed.barrier()  # not after an error, which may be this rank's alone
    finally:
        if process.is_rank_zero:
            shutil.rmtree(folder, ignore_errors=True)
        _forget_compiled()
        reset_peak(process.device)
        set_rng_state(before, process.device)


def nearest_existing(folder: Path) -> Path:
    """The folder itself or, where it is not there yet, the nearest one above: it is on the same disk."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:  # where nothing was compiled, to load it takes seconds
        torch.compiler.reset()


def _remove_left_behind(base: Path) -> None:
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):  # in use by another rehearsal, or another user's
            if not (folder / ".lock").is_file():  # a rehearsal's, if it is empty; else nothing of ours
                folder.rmdir()
                continue
            with file_lock(folder / ".lock", wait=False):
                pass
            shutil.rmtree(folder)


# -- made-up text -----------------------------------------------------------------------------------------------------


def synthetic_dataset(config: RunConfig, folder: Path, tokenizer: Tokenizer, process: DistContext) -> Dataset:
    """Documents of random tokens: as many as one step trains on, and one batch of validation for each rank."""
    seq_len = config.model.max_seq_len
    batch = batch_plan(config, process.world_size)
    tokens = {"train": batch.sequences * seq_len + 1}
    tokens["val"] = max(batch.micro_tokens, 8 * DOCUMENT_TOKENS) + 1
    folder = folder / "dataset"
    if process.is_rank_zero:
        folder.mkdir(exist_ok=True)
        chance, shards = np.random.Generator(np.random.PCG64(config.train.seed)), []
        for split, count in tokens.items():
            array = chance.integers(min(tokenizer.vocab_size, config.model.vocab_size), size=count, dtype=np.uint16)
            array[::DOCUMENT_TOKENS] = tokenizer.end_of_text
            file, documents = folder / f"{split}.npy", -(-count // DOCUMENT_TOKENS)
            np.save(file, array)
            shards.append(asdict(Shard(file.name, split, count, documents, file_sha256(file))))
        manifest = {"format": FORMAT, "fingerprint": "made up", "source": "made up", "tokenizer": tokenizer.describe()}
        write_json(folder / MANIFEST, manifest | {"shards": shards})
    distributed.barrier()
    return Dataset.open(folder)


def synthetic_hellaswag(folder: Path, count: int) -> Path:
    """So many rows in HellaSwag's format, about as long as its longer ones."""
    context, ending = "the river ran under the old stone bridge while " * 12, "the children counted boats and sang " * 4
    row = {
        "activity_label": "Walking",
        "ctx_a": context,
        "ctx_b": "",
        "ctx": context,
        "endings": [ending] * 4,
        "label": 0,
    }
    file = folder / HELLASWAG
    file.write_text("".join(f"{json.dumps(row)}\n" for _ in range(count)), encoding="utf-8")
    return file


# -- the parts of a run -----------------------------------------------------------------------------------------------


class Parts:
    """Model, optimizer and what a step calls, made as `train` makes them.

    Args:
        stack: ends them, and with them the choice of kernels that holds for the whole process until then.
        say: called with the lines of a run's log about its kernels.
    """

    def __init__(
        self, config: RunConfig, process: DistContext, stack: ExitStack, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.config, self.process = config, process
        self.model = Transformer(config.model, config.train.seed).to(process.device)
        self.whole = shard(self.model, config, process)  # what evaluations see
        self.optimizer = ScheduledAdamW(self.model.named_parameters(), config.optim, config.train.max_steps)
        self.runner = stack.enter_context(fast_kernels(self.model, config, process, say))
        self.guard = GradientGuard(config.train, process.device)

    def loader(self, dataset: Dataset, batch: BatchPlan) -> BatchLoader:
        position = self.state(dataset, 0).data
        return BatchLoader(dataset.train, batch, position, self.process.rank, self.process.device)

    def state(self, dataset: Dataset, step: int) -> TrainState:
        return TrainState(step, 0, DataPosition(0, 0, self.config.train.seed, dataset.fingerprint))

    def trainer(self, loader: BatchLoader, dataset: Dataset, batch: BatchPlan) -> Trainer:
        ctx, model = RunContext.create(self.config, self.process), self.model
        return Trainer(ctx, dataset, batch, model, self.whole, self.runner, self.optimizer, loader, self.guard)

    def step(self, loader: BatchLoader, dataset: Dataset, batch: BatchPlan, step: int) -> tuple[float, float]:
        """One real step, done when it returns; loss and gradient norm of this rank."""
        self.guard.record(self.state(dataset, step))
        loss, grad_norm, _ = train_step(self.trainer(loader, dataset, batch), step)
        return float(loss), float(grad_norm)


def shorten(batch: BatchPlan, accumulation_steps: int = 2) -> BatchPlan:
    """The same micro-steps, but no more than so many of them: with two a step has all that it ever has in memory."""
    steps = min(batch.grad_accum_steps, accumulation_steps)
    return replace(batch, batch_tokens=steps * batch.micro_tokens)


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_limit_bytes(process: DistContext) -> int:
    """What a run may use on each rank: what the rank with least has, less headroom."""
    mine = available_bytes(process.device, ranks.local_world_size())
    least = min(distributed.gather_object(mine), default=0)
    return int(distributed.broadcast_object(least) * (1 - HEADROOM))


def run_within_memory(work: Callable[[], Any], process: DistContext, limit_bytes: int) -> tuple[Any, int]:
    """Do some of a run's work with so much memory.

    All ranks have the same limit and so run out at the same point: none waits for another in a collective. Where one
    runs out alone all the same, the others may be in one that it will never join, and it ends the trial for all.

    Returns:
        what `work` gave, and the peak in bytes on the rank that used most.

    Raises:
        OutOfMemory: it needs more, on some rank.
        UserError: on this rank alone.
    """
    result, failed = None, False
    reset_peak(process.device)
    with memory_limit(process.device, limit_bytes):
        try:
            result = work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
    if not distributed.all_ranks_arrive("memory", ALONE_S if failed else 0.0):
        raise UserError(
            f"out of memory on rank {process.rank} ({device_name(process.device)}) alone: the other ranks have not run "
            f"out of theirs within {ALONE_S:,.0f} s; free what else is on this device, or lower train.micro_batch_size"
        )
    peak = peak_bytes(process.device)
    peak = distributed.broadcast_object(max(distributed.gather_object(peak), default=0))
    (failed,) = distributed.all_reduce_any(failed)
    if failed or peak > limit_bytes:
        raise OutOfMemory
    return result, peak


def measure_peak_bytes(
    config: RunConfig, dataset: Dataset, process: DistContext, micro_batch_size: int, limit_bytes: int
) -> int | None:
    """Peak bytes of two real steps with that micro-batch size, on the rank that used most; None if they do not fit."""
    config = replace(config, train=replace(config.train, micro_batch_size=micro_batch_size))
    batch = shorten(batch_plan(config, process.world_size))

    def two_steps() -> None:
        with ExitStack() as stack:
            parts = Parts(config, process, stack)
            loader = stack.enter_context(parts.loader(dataset, batch))
            for step in range(2):  # the second one has AdamW's moments beside its activations
                parts.step(loader, dataset, batch, step)

    try:
        return run_within_memory(two_steps, process, limit_bytes)[1]
    except OutOfMemory:
        return None
    finally:
        _forget_compiled()  # the next size is compiled as if it were the first, as in the run
        reset_peak(process.device)
