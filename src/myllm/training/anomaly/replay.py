"""A flight bag's step once more, in one process: all ranks' samples one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from myllm.checkpoint.format import restore_random_state
from myllm.config import RunConfig, saved_config
from myllm.data.transfer import inputs_and_targets
from myllm.distributed.precision import autocast_to
from myllm.errors import UserError
from myllm.model.transformer import Transformer
from myllm.optim.adamw import ScheduledAdamW

from .diagnose import Diagnosis, diagnose
from .dump import AnomalyDump

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Replay:
    """What a step did, here."""

    diagnosis: Diagnosis
    """Its losses are those of `places`."""
    places: list[int]
    """The samples that took part, by their place in the step."""
    updates: dict[str, float]
    """How far the update moves each module's own weights, in norm. Empty where the gradient is not finite."""


def replay_step(
    bag: AnomalyDump, device: torch.device, dtype: torch.dtype = torch.float32, samples: Sequence[int] = ()
) -> Replay:
    """Make the step again: the same weights, samples, micro-batches and, on the same kind of device, dropout.

    Args:
        dtype: of matrix products; bfloat16 and float16 by autocast, without a loss scale.
        samples: only these, by their place in the step, one at a time. Empty: all, as the run had them.

    Raises:
        UserError: no such sample, or a bag that fits no model.
    """
    if odd := [place for place in samples if not 0 <= place < len(bag.samples)]:
        raise UserError(f"the step has samples 0 to {len(bag.samples) - 1:,}; there is no {odd[0]:,}")
    config = saved_config(bag.config, bag.folder / "config.json")
    model = Transformer(config.model)
    try:
        model.load_state_dict(bag.model)
    except RuntimeError as error:
        raise UserError(f"the weights in {bag.folder} do not fit its config: {error}") from None
    model.to(device)
    autocast = partial(autocast_to, dtype, device)
    groups = [(None, [place]) for place in samples] or list(_micro_batches(bag))
    places = [place for _, group in groups for place in group]
    batches = tqdm(_batches(bag, groups, device), total=len(groups), unit="micro-batch", desc="replay", disable=None)
    diagnosis = diagnose(model, batches, len(groups), autocast)
    updates = _updates(bag, model, config) if not diagnosis.bad_gradients else {}
    return Replay(diagnosis, places, updates)


def _micro_batches(bag: AnomalyDump) -> Iterator[tuple[int | None, list[int]]]:
    """The places of each micro-batch, rank by rank; with a rank's number before its first."""
    for rank in range(bag.about["world_size"]):
        mine: dict[int, list[int]] = {}
        for row in bag.samples:
            if row["rank"] == rank:
                mine.setdefault(row["micro_step"], []).append(row["sample"])
        for micro_step, places in sorted(mine.items()):
            yield rank if micro_step == 0 else None, places


def _batches(bag: AnomalyDump, groups: list[tuple[int | None, list[int]]], device: torch.device) -> Iterator[Batch]:
    for rank, places in groups:
        if rank is not None:
            restore_random_state(bag.random[rank], device)
        tokens, targets = inputs_and_targets(bag.tokens[places])
        yield tokens.to(device), targets.to(device)


def _updates(bag: AnomalyDump, model: Transformer, config: RunConfig) -> dict[str, float]:
    """Make the update, and measure by how much it moved each module's own weights."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = ScheduledAdamW(model.named_parameters(), config.optim, config.train.max_steps)
    optimizer.load_state_dict(bag.optimizer)
    nn.utils.clip_grad_norm_(optimizer.parameters.values(), config.optim.max_grad_norm)
    optimizer.step(bag.about["step"] - 1)
    squares: dict[str, float] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            squares[module] = squares.get(module, 0.0) + (parameter - before[name]).norm().item() ** 2
            parameter.copy_(before[name])
    return {module: square**0.5 for module, square in squares.items()}
