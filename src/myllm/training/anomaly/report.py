"""What happens after the guard skipped updates: a line in the log, or the end of the run with an anomaly dump.

The guard makes no update after the step that ends the run, so weights and optimizer are still those before that step.
Each rank repeats its share of the step, layer by layer, to find where the numbers stop being finite.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from myllm.checkpoint.dcp import copy_to_host, flatten_moments, rank_tensors
from myllm.checkpoint.format import Snapshot, write_checkpoint
from myllm.checkpoint.rng import set_rng_state
from myllm.checkpoint.state import TrainState
from myllm.config import TrainConfig, to_dict
from myllm.data.dataloader import read_batch
from myllm.data.sampler import rank_rows
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.device_info import device_name
from myllm.distributed.parallelize import full_params
from myllm.distributed.precision import autocast, compute_dtype, deterministic, dtype_name
from myllm.errors import TrainingDiverged
from myllm.formatting import format_names
from myllm.model.attention_backend import training_backends
from myllm.planning.batch import BatchPlan
from myllm.training.gradient_guard import SkippedStep
from myllm.training.setup import Trainer

from .diagnose import Diagnosis, diagnose
from .dump import dump_folder, finish_dump, partial_folder

SHOWN_CHARS = 120
"""Of a sample's text."""
SHOWN_NAMES = 4


def raise_if_diverged(state: TrainState, trainer: Trainer) -> None:
    """Log the updates that the guard has skipped since the last call. Every rank calls this at the same steps.

    Raises:
        TrainingDiverged: the last of them ends the run. Its anomaly dump is written.
    """
    guard = trainer.guard
    skipped, guard.skipped = guard.skipped, []
    for bad in skipped[:-1] if guard.diverged else skipped:
        trainer.ctx.log(skip_message(bad, trainer.batch))
    if guard.diverged:
        raise TrainingDiverged(_dump_step(skipped[-1], state, trainer))


def _dump_step(bad: SkippedStep, state: TrainState, trainer: Trainer) -> str:
    """Diagnose the step on every rank and write the dump. Returns the message that ends the run, on every rank."""
    ctx, batch, dataset = trainer.ctx, trainer.batch, trainer.dataset
    tokenizer = dataset.tokenizer()
    order = dataset.order(batch)
    sequences = order.take(bad.data, batch.sequences)
    diagnosis, error = None, None
    with full_params(trainer.model, trainer.eval_model):
        try:
            diagnosis = _diagnose_share(bad, sequences, trainer)
        except Exception as raised:  # for example no memory for a model that is not compiled
            error = f"{type(raised).__name__}: {raised}"
    reports = distributed.all_gather_object((diagnosis, error))
    folder = dump_folder(ctx.paths, bad.step)
    failure = _write_checkpoint(partial_folder(folder), bad, state, trainer, tokenizer)
    message = None
    if ctx.dist.is_rank_zero:
        diagnoses, errors = (list(column) for column in zip(*reports, strict=True))
        summary = _summary(bad, trainer, diagnoses, errors)
        tokens = order.read(sequences)
        samples = _samples(sequences, [tokenizer.decode(row) for row in tokens], diagnoses, batch)
        try:
            if failure:
                raise failure
            finish_dump(folder, summary, samples, tokens, diagnoses)
        except Exception as raised:  # a full disk must not hide the message
            failure = raised
        finally:
            shutil.rmtree(partial_folder(folder), ignore_errors=True)
        message = failure_message(summary, samples, ctx.config.train, folder, failure)
        with suppress(OSError):  # a full disk again; the terminal shows the message
            ctx.log(message)
    return distributed.broadcast_object(message)


def _diagnose_share(bad: SkippedStep, sequences: np.ndarray, trainer: Trainer) -> Diagnosis:
    """Repeat this rank's share of the step, in the precision and on the device of the run.

    Args:
        sequences: of the step, in their global order, (G,) int64.
    """
    config, dist, batch = trainer.ctx.config, trainer.ctx.dist, trainer.batch
    set_rng_state(bad.random, dist.device)
    micro_batches = [
        sequences[rank_rows(micro_step, dist.rank, batch.world_size, batch.micro_batch_size)]
        for micro_step in range(batch.grad_accum_steps)
    ]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in micro_batches:
            tokens, targets = read_batch(trainer.dataset.order(batch), rows)
            yield tokens.to(dist.device), targets.to(dist.device)

    with training_backends(dist.device, config.train), deterministic(config.train.deterministic):
        return diagnose(trainer.eval_model, batches(), len(micro_batches), partial(autocast, config, dist.device))


def _write_checkpoint(
    folder: Path, bad: SkippedStep, state: TrainState, trainer: Trainer, tokenizer: Tokenizer
) -> Exception | None:
    """Write the state before the step, from all ranks together, not-finite weights included. Returns the error, if any.

    Statistics of skipped updates and the digest of the samples are missing: they are known for later steps only.
    """
    ctx = trainer.ctx
    tokens_seen = state.tokens_seen - (state.step - bad.step + 1) * trainer.batch.batch_tokens
    before = TrainState(bad.step - 1, tokens_seen, bad.data, state.early_stop)
    tensors = trainer.model.state_dict(), flatten_moments(trainer.optimizer.state_dict())
    try:
        weights, optimizer = (
            copy_to_host(rank_tensors(named, ctx.dist.rank, ctx.dist.world_size), {}) for named in tensors
        )
        tokenizer_file = None if tokenizer.is_default else tokenizer.file
        random = {ctx.dist.rank: bad.random}
        write_checkpoint(folder, Snapshot(before, to_dict(ctx.config), weights, optimizer, random, tokenizer_file))
    except Exception as error:
        return error
    return None


def _samples(
    sequences: np.ndarray, texts: list[str], diagnoses: list[Diagnosis | None], batch: BatchPlan
) -> list[dict[str, Any]]:
    """One row for each sample, in the step's order."""
    rows = []
    for index, (sequence, text) in enumerate(zip(sequences.tolist(), texts, strict=True)):
        micro_step, rank = divmod(index // batch.micro_batch_size, batch.world_size)
        diagnosis = diagnoses[rank]
        on_rank = micro_step * batch.micro_batch_size + index % batch.micro_batch_size
        loss = diagnosis.losses[on_rank] if diagnosis else None
        gradient = diagnosis.input_gradient_norms[on_rank] if diagnosis else None
        rows.append({
            "sample": index, "sequence": sequence, "rank": rank, "micro_step": micro_step, "loss": loss,
            "gradient": gradient, "text": text,
        })  # fmt: skip
    return rows


def _summary(
    bad: SkippedStep, trainer: Trainer, diagnoses: list[Diagnosis | None], errors: list[str | None]
) -> dict[str, Any]:
    """The content of anomaly.json."""
    config, dist = trainer.ctx.config, trainer.ctx.dist
    known = [diagnosis for diagnosis in diagnoses if diagnosis]
    gradients = list(dict.fromkeys(name for diagnosis in known for name in diagnosis.nonfinite_gradients))
    backward = [diagnosis.first_nonfinite_backward for diagnosis in known]
    diverged_again = bool(gradients) or any(not math.isfinite(diagnosis.loss) for diagnosis in known)
    return {
        "step": bad.step,
        "kind": bad.kind,
        "consecutive": trainer.guard.sync().consecutive,
        "grad_norm": bad.grad_norm,
        "loss": sum(diagnosis.loss for diagnosis in known) / len(known) if len(known) == len(diagnoses) else None,
        "reproduced": diverged_again if known else None,
        "data": asdict(bad.data),
        "dataset": trainer.dataset.name,
        "world_size": dist.world_size,
        "micro_batch_size": trainer.batch.micro_batch_size,
        "device": dist.device.type,
        "device_name": device_name(dist.device),
        "precision": dtype_name(compute_dtype(config.train.precision, dist.device)),
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


# -- in words ---------------------------------------------------------------------------------------------------------


def skip_message(bad: SkippedStep, batch: BatchPlan) -> str:
    reason = {
        "nonfinite": "its gradient is not finite",
        "spike": f"its gradient norm {bad.grad_norm:.3g} is a spike",
        "overflow": "its gradient overflowed float16, so the loss scale is halved",
    }[bad.kind]
    position = _data_position(bad.data.epoch, bad.data.index, batch.sequences)
    return f"skipped the update of step {bad.step:,}: {reason} (data: {position})"


def failure_message(
    summary: dict[str, Any], samples: list[dict[str, Any]], train: TrainConfig, dump: Path, failure: Exception | None
) -> str:
    """What happened, where, and what to do.

    Args:
        samples: the rows of samples.jsonl.
        failure: why the dump could not be written.
    """
    step, data = summary["step"], summary["data"]
    too_many = summary["kind"] == "spike" or train.on_nonfinite == "skip"
    problem = f"the gradient of step {step:,} is not finite"
    if summary["kind"] == "spike":
        problem = f"the gradient norm of step {step:,} is a spike, {summary['grad_norm']:.3g}"
    lines = [f"{problem}: the update was skipped, and nothing was saved since"]
    if too_many:
        limit = train.max_skipped_steps
        lines.append(f"  skipped      {summary['consecutive']:,} in a row; train.max_skipped_steps is {limit:,}")
    position = _data_position(data["epoch"], data["index"], len(samples))
    lines.append(f"  data         {position} of {summary['dataset']}")
    lines += _findings(summary, samples)
    lines.append(f"  dump         {f'not written: {failure}' if failure else dump}")
    lines.append("what to do")
    if not failure:
        lines.append(f"  myllm replay {dump}   repeats this step on the CPU and shows its text")
    remedy = "raise --train.max-skipped-steps" if too_many else "skip such updates with --train.on-nonfinite skip"
    lines += [
        "  The same command resumes from the newest checkpoint. If the same step fails again, its data or the weights",
        f"  are the cause: lower --optim.max-lr, or {remedy}",
    ]
    return "\n".join(lines)


def _data_position(epoch: int, index: int, n_samples: int) -> str:
    return f"epoch {epoch}, samples {index:,} to {index + n_samples - 1:,} in shuffled order"


def _findings(summary: dict[str, Any], samples: list[dict[str, Any]]) -> list[str]:
    """Which sample, module and tensors."""
    lines = [
        f"  no diagnosis rank {rank} could not repeat the step: {error}"
        for rank, error in enumerate(summary["errors"])
        if error
    ]
    if summary["nonfinite_weights"]:
        lines.append(
            f"  weights      not finite before the step: {format_names(summary['nonfinite_weights'], SHOWN_NAMES)}"
        )
    lines += _sample_lines(summary["kind"], samples)
    for first in summary["first_nonfinite"][:SHOWN_NAMES]:
        input_state = "finite" if first["input_finite"] else "not finite either"
        lines.append(
            f"  first seen   in the output of {first['module']} on rank {first['rank']}; its input was {input_state}"
        )
    if summary["first_nonfinite_backward"] and not summary["first_nonfinite"]:
        module = summary["first_nonfinite_backward"]
        lines.append(f"  first seen   in the backward pass, in the gradient of the output of {module}")
    if summary["nonfinite_gradients"]:
        lines.append(f"  gradients    not finite: {format_names(summary['nonfinite_gradients'], SHOWN_NAMES)}")
    if summary["kind"] == "nonfinite" and summary["reproduced"] is False:
        lines.append(
            "  repeated     at once on the same device, the step is finite: suspect the device or the code that "
            "torch.compile generated before the data"
        )
    return lines


def _sample_lines(kind: str, samples: list[dict[str, Any]]) -> list[str]:
    if kind == "spike":  # every sample is finite, but one may have most of the gradient
        bad = sorted(samples, key=lambda row: row["gradient"] or 0.0, reverse=True)[:1]
    else:
        bad = [row for row in samples if not all(math.isfinite(row[key] or 0.0) for key in ("loss", "gradient"))]
    lines = []
    for row in bad[:SHOWN_NAMES]:
        values = "not known"
        if row["loss"] is not None:
            values = f"loss {row['loss']:.4g}, gradient {row['gradient']:.4g}"
        lines.append(
            f"  sample {row['sample']:<5} {values}: sequence {row['sequence']:,}, on rank {row['rank']}, "
            f"{row['text'][:SHOWN_CHARS]!r}"
        )
    if len(bad) > SHOWN_NAMES:
        lines.append(f"               and {len(bad) - SHOWN_NAMES:,} more of {len(samples):,} samples")
    return lines
