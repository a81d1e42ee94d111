"""What becomes of updates that the guard left out: a line in the log, or the end of the run with a flight bag.

At the end weights, optimizer and generators can be brought back to where the bad step began, since the guard makes no
update after it. So each rank makes its share of that step again, layer by layer, to see where the numbers go bad.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from myllm.checkpoint.format import TrainState, restore_random_state
from myllm.config import RunConfig, to_dict
from myllm.data.dataloader import read_batch, read_rows
from myllm.data.dataset import Dataset
from myllm.data.sampler import count_sequences, rank_rows, step_sequences, window_sequences
from myllm.data.tokenizer.load import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.distributed.parallelize import full_params, full_tensor
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
from .dump import AnomalyDump, bag_folder, write_dump

SHOWN_CHARS = 120
"""Of a sample's text, in a message."""
SHOWN_NAMES = 4


@dataclass(frozen=True)
class StepContext:
    """What it takes to make a step again."""

    run: RunPaths
    config: RunConfig
    dataset: Dataset
    batch: BatchPlan
    model: Transformer
    """The bare one: no wrapper, no compile."""
    whole: Transformer
    """As `parallel.spread` returned it."""
    optimizer: ScheduledAdamW
    tokenizer: Tokenizer
    process: DistContext
    log: Log


def raise_if_diverged(state: TrainState, guard: GradientGuard, scene: StepContext) -> TrainState:
    """The state with its counts of updates left out. Says which these were; every rank must ask at the same steps.

    Raises:
        TrainingDiverged: it is time to stop. The run has a flight bag of the last of them.
    """
    skips = guard.sync()
    left_out, guard.skipped = guard.skipped, []
    for each in left_out[:-1] if guard.diverged else left_out:
        why = {
            "nonfinite": "its gradient is not finite",
            "spike": f"its gradient norm {each.grad_norm:.3g} is a spike",
            "overflow": "its gradient was too large for float16, and the loss scale is halved",
        }[each.kind]
        scene.log(f"left out the update of step {each.step:,}: {why} ({_place(each, scene.batch)})")
    if guard.diverged:
        message = _stop(left_out[-1], skips.in_a_row, scene)
        raise TrainingDiverged(message)
    return replace(state, skips=skips)


def _stop(bad: SkippedStep, in_a_row: int, scene: StepContext) -> str:
    """Take the step apart on every rank, pack the bag on rank 0, and say on all of them what happened."""
    sequences = sequences_of(bad, scene)
    diagnosis, fault = None, None
    with full_params(scene.model, scene.whole):
        try:
            diagnosis = _diagnose_share(bad, sequences, scene)
        except Exception as error:  # such as no memory for a model that is not compiled: what is known is said anyway
            fault = f"{type(error).__name__}: {error}"
        weights = _on_main(scene.whole.state_dict(), scene.process)
    reports = distributed.gather_object((diagnosis, fault, bad.random))
    moments = {name: _on_main(state, scene.process) for name, state in scene.optimizer.state_dict().items()}
    message = None
    if scene.process.is_rank_zero:
        diagnoses, faults, random = (list(each) for each in zip(*reports, strict=True))
        about = _about(bad, in_a_row, diagnoses, faults, scene)
        tokens = read_rows(scene.dataset.train, sequences, scene.batch.seq_len)
        samples = _samples(sequences, tokens, diagnoses, scene)
        folder = bag_folder(scene.run.bags, bad.step)
        bag = AnomalyDump(folder, about, samples, tokens, to_dict(scene.config), weights, moments, random)
        layers = [[asdict(layer) for layer in each.layers] if each else None for each in diagnoses]
        try:
            write_dump(folder, bag, layers)
            packed = f"{folder}"
        except Exception as error:  # a full disk must not swallow the message
            packed = f"none, it could not be written: {error}"
            folder = None
        message = "\n".join(_message(bag, packed, folder is not None))
        with suppress(OSError):  # a full disk again: the terminal has it
            scene.log(message)
    return distributed.broadcast_object(message)


def sequences_of(bad: SkippedStep, scene: StepContext) -> np.ndarray:
    """The step's sequences in their global order, (G,) int64."""
    n_sequences = count_sequences(scene.dataset.train.tokens, scene.batch.seq_len)
    return step_sequences(bad.data, scene.batch.sequences, n_sequences, window_sequences(scene.batch.seq_len))


def _diagnose_share(bad: SkippedStep, sequences: np.ndarray, scene: StepContext) -> Diagnosis:
    """This rank's share of the step once more, in the precision and on the device that it was made with."""
    batch, device = scene.batch, scene.process.device
    restore_random_state(bad.random, device)
    shares = [
        sequences[rank_rows(micro_step, scene.process.rank, batch.world_size, batch.micro_batch_size)]
        for micro_step in range(batch.grad_accum_steps)
    ]
    batches = (
        tuple(part.to(device) for part in read_batch(scene.dataset.train, share, batch.seq_len)) for share in shares
    )
    with sdpa.training_backends(device, scene.config.train), deterministic(scene.config.train.deterministic):
        return diagnose(scene.whole, batches, len(shares), partial(autocast, scene.config, device))


def _on_main(tensors: dict[str, Tensor], process: DistContext) -> dict[str, Tensor]:
    """Copies on the CPU, on rank 0; of tensors in parts, the whole, for which every rank has to take part."""
    copies = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor)
        if process.is_rank_zero:
            copies[name] = whole.detach().cpu()
    return copies


def _samples(
    sequences: np.ndarray, tokens: np.ndarray, diagnoses: list[Diagnosis | None], scene: StepContext
) -> list[dict[str, Any]]:
    """One row a sample, in the step's order."""
    micro, rows = scene.batch.micro_batch_size, []
    for place, sequence in enumerate(sequences.tolist()):
        micro_step, rank = divmod(place // micro, scene.batch.world_size)
        found, own = diagnoses[rank], micro_step * micro + place % micro
        rows.append(
            {
                "sample": place,
                "sequence": sequence,
                "rank": rank,
                "micro_step": micro_step,
                "loss": found.losses[own] if found else None,
                "gradient": found.input_gradients[own] if found else None,
                "text": scene.tokenizer.decode(tokens[place]),
            }
        )
    return rows


def _about(
    bad: SkippedStep, in_a_row: int, diagnoses: list[Diagnosis | None], faults: list[str | None], scene: StepContext
) -> dict[str, Any]:
    whole = [each for each in diagnoses if each]
    firsts = [(rank, each.first_bad) for rank, each in enumerate(diagnoses) if each and each.first_bad]
    bad_gradients = dict.fromkeys(name for each in whole for name in each.bad_gradients)
    return {
        "step": bad.step,
        "kind": bad.kind,
        "in_a_row": in_a_row,
        "grad_norm": bad.grad_norm,
        "loss": sum(each.loss for each in whole) / len(whole) if len(whole) == len(diagnoses) else None,
        "bad_again": bool(bad_gradients) or any(not math.isfinite(each.loss) for each in whole) if whole else None,
        "data": asdict(bad.data),
        "dataset": scene.dataset.name,
        "world_size": scene.process.world_size,
        "micro_batch_size": scene.batch.micro_batch_size,
        "device": scene.process.device.type,
        "device_name": device_name(scene.process.device),
        "precision": dtype_name(compute_dtype(scene.config.train.precision, scene.process.device)),
        "bad_weights": list(dict.fromkeys(name for each in whole for name in each.bad_weights)),
        "bad_gradients": list(bad_gradients),
        "first_bad_backward": next((each.first_bad_backward for each in whole if each.first_bad_backward), None),
        "first_bad": [
            {"rank": rank, "module": layer.module, "input_finite": layer.input_finite} for rank, layer in firsts
        ],
        "faults": faults,
    }


# -- words ------------------------------------------------------------------------------------------------------------


def _place(bad: SkippedStep, batch: BatchPlan) -> str:
    last = bad.data.index + batch.sequences - 1
    return f"data: epoch {bad.data.epoch}, samples {bad.data.index:,} to {last:,} of its order"


def _message(bag: AnomalyDump, packed: str, there: bool) -> list[str]:
    """What happened, where, and what to do."""
    about, data = bag.about, bag.about["data"]
    step, last = about["step"], data["index"] + len(bag.samples) - 1
    if about["kind"] == "nonfinite":
        lines = [f"the gradient of step {step:,} is not finite: the update was not made, and nothing was saved since"]
    else:
        lines = [
            f"the gradient norm of step {step:,} is a spike, {about['grad_norm']:.3g}: the update was not made, and "
            "nothing was saved since"
        ]
    if _too_many(bag):
        limit = bag.config["train"]["max_skipped_steps"]
        lines.append(f"  in a row     {about['in_a_row']:,} left out; train.max_skipped_steps is {limit:,}")
    lines.append(
        f"  data         epoch {data['epoch']}, samples {data['index']:,} to {last:,} of its order, of "
        f"{about['dataset']}"
    )
    lines += _findings(bag)
    lines.append(f"  flight bag   {packed}")
    lines.append("what to do")
    if there:
        lines.append(f"  myllm replay {packed}   makes this step again on the CPU, and shows its text")
    way_on = "raise --train.max-skipped-steps" if _too_many(bag) else "leave it out with --train.on-nonfinite skip"
    lines += [
        "  the same command goes back to the newest checkpoint; where the same step goes bad again, its data or the",
        f"  weights are the cause: lower --optim.max-lr, or {way_on}",
    ]
    return lines


def _too_many(bag: AnomalyDump) -> bool:
    """Whether the run ended for want of patience, not at the first number that is not finite."""
    return bag.about["kind"] == "spike" or bag.config["train"]["on_nonfinite"] == "skip"


def _findings(bag: AnomalyDump) -> list[str]:
    """Which sample, which module, which tensors."""
    about, lines = bag.about, []
    lines += [f"  not known    rank {rank} could not make it again: {f}" for rank, f in enumerate(about["faults"]) if f]
    if about["bad_weights"]:
        lines.append(f"  weights      not finite before the step: {_names(about['bad_weights'])}")
    guilty = [row for row in bag.samples if not (_finite(row["loss"]) and _finite(row["gradient"]))]
    if about["kind"] == "spike":  # no sample is bad, but one may have most of the gradient
        guilty = sorted(bag.samples, key=lambda row: row["gradient"] or 0.0, reverse=True)[:1]
    for row in guilty[:SHOWN_NAMES]:
        figures = f"loss {row['loss']:.4g}, gradient {row['gradient']:.4g}" if row["loss"] is not None else "not known"
        lines.append(
            f"  sample {row['sample']:<5} {figures}: sequence {row['sequence']:,}, on rank {row['rank']}, "
            f"{row['text'][:SHOWN_CHARS]!r}"
        )
    if len(guilty) > SHOWN_NAMES:
        lines.append(f"               and {len(guilty) - SHOWN_NAMES:,} more of {len(bag.samples):,} samples")
    for first in about["first_bad"][:SHOWN_NAMES]:
        given = "was finite" if first["input_finite"] else "was not finite either"
        lines.append(
            f"  first seen   in the output of {first['module']}, on rank {first['rank']}; what it was given {given}"
        )
    if about["first_bad_backward"] and not about["first_bad"]:
        lines.append(f"  first seen   going backward, in the gradient of the output of {about['first_bad_backward']}")
    if about["bad_gradients"]:
        lines.append(f"  gradients    not finite: {_names(about['bad_gradients'])}")
    if about["kind"] == "nonfinite" and about["bad_again"] is False:
        lines.append(
            "  made again   at once on the same device, the step is finite: suspect the device, or what torch.compile "
            "made of the model, before the data"
        )
    return lines


def _finite(value: float | None) -> bool:
    """Whether a figure is finite, or not known."""
    return value is None or math.isfinite(value)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
