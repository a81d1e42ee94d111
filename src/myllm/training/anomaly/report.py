"""What happens after the guard skipped updates: a line in the log, or the end of the run with an anomaly dump.

The guard makes no update after the step that ends the run, so weights and optimizer are still those before that step.
Each rank repeats its share of the step, layer by layer, to find where the numbers stop being finite.
"""

import math
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from myllm.checkpoint import dcp as sharded
from myllm.checkpoint import format as checkpoint
from myllm.checkpoint.format import Snapshot, TrainState, restore_random_state
from myllm.config import RunConfig, to_dict
from myllm.data.dataloader import read_batch, read_rows
from myllm.data.dataset import Dataset
from myllm.data.sampler import count_sequences, rank_rows, step_sequences, window_sequences
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.distributed.parallelize import full_params
from myllm.distributed.precision import autocast, compute_dtype, deterministic, dtype_name
from myllm.errors import TrainingDiverged
from myllm.model import attention_backend as sdpa
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW
from myllm.paths import RunPaths
from myllm.planning.batch import BatchPlan
from myllm.runs.logs import Log
from myllm.training.gradient_guard import GradientGuard, SkippedStep

from .diagnose import Diagnosis, diagnose
from .dump import dump_folder, finish_dump, partial_folder
from .message import failure_message, skip_message


@dataclass(frozen=True)
class StepContext:
    """What it takes to repeat a step."""

    run: RunPaths
    config: RunConfig
    dataset: Dataset
    batch: BatchPlan
    model: Transformer
    """Unwrapped and not compiled."""
    whole: Transformer
    """As `parallel.spread` returned it."""
    optimizer: ScheduledAdamW
    tokenizer: Tokenizer
    process: DistContext
    log: Log


def raise_if_diverged(state: TrainState, guard: GradientGuard, ctx: StepContext) -> TrainState:
    """Log the updates that were skipped since the last call. Every rank calls this at the same steps.

    Returns:
        the state with the guard's counts.

    Raises:
        TrainingDiverged: the last of them ends the run. Its anomaly dump is written.
    """
    skips = guard.sync()
    skipped, guard.skipped = guard.skipped, []
    for bad in skipped[:-1] if guard.diverged else skipped:
        ctx.log(skip_message(bad, ctx.batch))
    if guard.diverged:
        raise TrainingDiverged(_dump_step(skipped[-1], skips.in_a_row, state, ctx))
    return replace(state, skips=skips)


def _dump_step(bad: SkippedStep, consecutive: int, state: TrainState, ctx: StepContext) -> str:
    """Diagnose the step on every rank and write the dump. Returns the message that ends the run, on every rank."""
    sequences = _sequences_of(bad, ctx)
    diagnosis, error = None, None
    with full_params(ctx.model, ctx.whole):
        try:
            diagnosis = _diagnose_share(bad, sequences, ctx)
        except Exception as raised:  # for example no memory for a model that is not compiled
            error = f"{type(raised).__name__}: {raised}"
    reports = distributed.gather_object((diagnosis, error))
    folder = dump_folder(ctx.run, bad.step)
    failure = _write_checkpoint(partial_folder(folder), bad, state, ctx)
    message = None
    if ctx.process.is_rank_zero:
        diagnoses, errors = (list(column) for column in zip(*reports, strict=True))
        summary = _summary(bad, consecutive, diagnoses, errors, ctx)
        tokens = read_rows(ctx.dataset.train, sequences, ctx.batch.seq_len)
        samples = _samples(sequences, tokens, diagnoses, ctx)
        try:
            if failure:
                raise failure
            finish_dump(folder, summary, samples, tokens, diagnoses)
        except Exception as raised:  # a full disk must not hide the message
            failure = raised
        finally:
            shutil.rmtree(partial_folder(folder), ignore_errors=True)
        message = failure_message(summary, samples, ctx.config, folder, failure)
        with suppress(OSError):  # a full disk again; the terminal shows the message
            ctx.log(message)
    return distributed.broadcast_object(message)


def _sequences_of(bad: SkippedStep, ctx: StepContext) -> np.ndarray:
    """The step's sequences in their global order, (G,) int64."""
    n_sequences = count_sequences(ctx.dataset.train.tokens, ctx.batch.seq_len)
    return step_sequences(bad.data, ctx.batch.sequences, n_sequences, window_sequences(ctx.batch.seq_len))


def _diagnose_share(bad: SkippedStep, sequences: np.ndarray, ctx: StepContext) -> Diagnosis:
    """Repeat this rank's share of the step, in the precision and on the device of the run."""
    batch, device, train = ctx.batch, ctx.process.device, ctx.config.train
    restore_random_state(bad.random, device)
    micro_batches = [
        sequences[rank_rows(micro_step, ctx.process.rank, batch.world_size, batch.micro_batch_size)]
        for micro_step in range(batch.grad_accum_steps)
    ]
    batches = (
        tuple(tensor.to(device) for tensor in read_batch(ctx.dataset.train, rows, batch.seq_len))
        for rows in micro_batches
    )
    with sdpa.training_backends(device, train), deterministic(train.deterministic):
        return diagnose(ctx.whole, batches, len(micro_batches), partial(autocast, ctx.config, device))


def _write_checkpoint(folder: Path, bad: SkippedStep, state: TrainState, ctx: StepContext) -> Exception | None:
    """Write the state before the step, from all ranks together, not-finite weights included. Returns the error, if any.

    Statistics of skipped updates and the digest of the samples are left out: they are known for later steps only.
    """
    rank, world_size = ctx.process.rank, ctx.process.world_size
    tokens_seen = state.tokens_seen - (state.step - bad.step + 1) * ctx.batch.batch_tokens
    before = TrainState(bad.step - 1, tokens_seen, bad.data, state.early_stop)
    moments = checkpoint.by_name(ctx.optimizer.state_dict())
    tensors = [sharded.plain_names(named.items()) for named in (ctx.model.state_dict(), moments)]
    try:
        shares = [sharded.to_host(sharded.share(named, rank, world_size), {}) for named in tensors]
        tokenizer_file = None if ctx.tokenizer.is_default else ctx.tokenizer.file
        checkpoint.write(folder, Snapshot(before, to_dict(ctx.config), *shares, {rank: bad.random}, tokenizer_file))
    except Exception as error:
        return error
    return None


def _samples(
    sequences: np.ndarray, tokens: np.ndarray, diagnoses: list[Diagnosis | None], ctx: StepContext
) -> list[dict[str, Any]]:
    """One row for each sample, in the step's order."""
    size, rows = ctx.batch.micro_batch_size, []
    for index, sequence in enumerate(sequences.tolist()):
        micro_step, rank = divmod(index // size, ctx.batch.world_size)
        diagnosis, index_on_rank = diagnoses[rank], micro_step * size + index % size
        rows.append(
            {
                "sample": index,
                "sequence": sequence,
                "rank": rank,
                "micro_step": micro_step,
                "loss": diagnosis.losses[index_on_rank] if diagnosis else None,
                "gradient": diagnosis.input_gradient_norms[index_on_rank] if diagnosis else None,
                "text": ctx.tokenizer.decode(tokens[index]),
            }
        )
    return rows


def _summary(
    bad: SkippedStep, consecutive: int, diagnoses: list[Diagnosis | None], errors: list[str | None], ctx: StepContext
) -> dict[str, Any]:
    """The content of anomaly.json."""
    known = [diagnosis for diagnosis in diagnoses if diagnosis]
    gradients = list(dict.fromkeys(name for diagnosis in known for name in diagnosis.nonfinite_gradients))
    backward = [diagnosis.first_nonfinite_backward for diagnosis in known]
    diverged_again = bool(gradients) or any(not math.isfinite(diagnosis.loss) for diagnosis in known)
    return {
        "step": bad.step,
        "kind": bad.kind,
        "consecutive": consecutive,
        "grad_norm": bad.grad_norm,
        "loss": sum(diagnosis.loss for diagnosis in known) / len(known) if len(known) == len(diagnoses) else None,
        "reproduced": diverged_again if known else None,
        "data": asdict(bad.data),
        "dataset": ctx.dataset.name,
        "world_size": ctx.process.world_size,
        "micro_batch_size": ctx.batch.micro_batch_size,
        "device": ctx.process.device.type,
        "device_name": device_name(ctx.process.device),
        "precision": dtype_name(compute_dtype(ctx.config.train.precision, ctx.process.device)),
        "nonfinite_weights": list(dict.fromkeys(name for diagnosis in known for name in diagnosis.nonfinite_weights)),
        "nonfinite_gradients": gradients,
        "first_nonfinite_backward": next(filter(None, backward), None),
        "first_nonfinite": [
            {"rank": rank, "module": layer.module, "input_finite": layer.input_finite}
            for rank, diagnosis in enumerate(diagnoses)
            if diagnosis and (layer := diagnosis.first_nonfinite)
        ],
        "errors": errors,
    }
