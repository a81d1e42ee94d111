"""Replay the step of an anomaly dump in one process: the samples of all ranks, one rank after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from myllm.checkpoint.rng import set_rng_state
from myllm.data.transfer import inputs_and_targets
from myllm.distributed.precision import autocast_to
from myllm.errors import UserError
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer

from .diagnose import Diagnosis, diagnose
from .dump import AnomalyDump

MicroBatch = tuple[list[int], int | None]
"""Indices of its samples, and the rank whose random state is restored before it."""


@dataclass(frozen=True)
class Replay:
    """The replayed step."""

    diagnosis: Diagnosis
    """Its losses are those of `samples`."""
    samples: list[int]
    """Indices in the step, in the order in which they were computed."""
    updates: dict[str, float]
    """Norm of the change that the update makes to each module's own weights. Empty if the gradient is not finite."""


def replay_step(
    dump: AnomalyDump, device: torch.device, dtype: torch.dtype = torch.float32, samples: Sequence[int] = ()
) -> Replay:
    """Repeat the step with the same weights, samples and micro-batches and, on the same kind of device, dropout.

    Args:
        dtype: of matrix products; bfloat16 and float16 by autocast, without a loss scale.
        samples: only these indices in the step, one at a time. Empty: the whole step.

    Raises:
        UserError: no such sample, or weights that do not fit the config.
    """
    if unknown := [index for index in samples if not 0 <= index < len(dump.samples)]:
        raise UserError(f"no sample {unknown[0]:,} in this step; it has samples 0 to {len(dump.samples) - 1:,}")
    model = Transformer(dump.config.model)
    try:
        model.load_state_dict(dump.model)
    except RuntimeError as error:
        raise UserError(f"the weights in {dump.folder} do not fit its config: {error}") from None
    model.to(device)
    micro_batches: list[MicroBatch] = [([index], None) for index in samples] or list(_micro_batches(dump))
    batches = _batches(dump, micro_batches, device)
    batches = tqdm(batches, total=len(micro_batches), unit="micro-batch", desc="replay", disable=None)
    diagnosis = diagnose(model, batches, len(micro_batches), partial(autocast_to, dtype, device))
    updates = _updates(dump, model) if not diagnosis.nonfinite_gradients else {}
    return Replay(diagnosis, [index for indices, _ in micro_batches for index in indices], updates)


def _micro_batches(dump: AnomalyDump) -> Iterator[MicroBatch]:
    """Rank by rank, each in the run's order."""
    by_rank = itemgetter("rank", "micro_step")
    for (rank, micro_step), rows in groupby(sorted(dump.samples, key=by_rank), key=by_rank):
        yield [row["sample"] for row in rows], rank if micro_step == 0 else None


def _batches(
    dump: AnomalyDump, micro_batches: list[MicroBatch], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for indices, first_of_rank in micro_batches:
        if first_of_rank is not None:
            set_rng_state(dump.random[first_of_rank], device)
        tokens, targets = inputs_and_targets(dump.tokens[indices])
        yield tokens.to(device), targets.to(device)


def _updates(dump: AnomalyDump, model: Transformer) -> dict[str, float]:
    """Apply the update, measure how far it moves each module's own weights, and undo it."""
    optim = dump.config.optim
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = ScheduledOptimizer(
        model.named_parameters(), model.hidden_matrices(), optim, dump.config.train.max_steps
    )
    optimizer.load_state_dict(dump.optimizer)
    nn.utils.clip_grad_norm_(optimizer.parameters.values(), optim.max_grad_norm)
    optimizer.step(dump.summary["step"] - 1)
    squares: dict[str, float] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            squares[module] = squares.get(module, 0.0) + (parameter - before[name]).norm().item() ** 2
            parameter.copy_(before[name])
    return {module: square**0.5 for module, square in squares.items()}
