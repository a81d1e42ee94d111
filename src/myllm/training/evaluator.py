"""The evaluations of a training run: when they are due, and how ranks run them. Writes eval rows and samples.jsonl."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from myllm.checkpoint.state import TrainState
from myllm.data.dataset import Dataset
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.precision import autocast
from myllm.distributed.terminal import LINE_WIDTH
from myllm.errors import UserError
from myllm.evals import cloze
from myllm.evals.registry import EvalInputs, EvalOptions, build
from myllm.evals.validation_sets import open_validation_sets
from myllm.inference.completion import complete
from myllm.inference.generate import LanguageModel
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer
from myllm.planning.batch import batch_plan
from myllm.runs.heartbeat import Heartbeat
from myllm.runs.reference_curve import ReferenceWatch

from .setup import RunContext
from .stop_signals import StopRequest


class EvalInterrupted(Exception):
    """A stop was requested during an evaluation. After the resume it runs again from its start."""


class StopVote:
    """Lets all ranks leave an evaluation together when one was asked to stop.

    Ranks vote before every batch. A rank that has finished its batches keeps voting until all have, so ranks may have
    different numbers of batches.
    """

    def __init__(self, stop: StopRequest, heartbeat: Heartbeat, bar: tqdm | None = None) -> None:
        self._stop, self._heartbeat, self._bar, self._stopped = stop, heartbeat, bar, False

    def __call__(self) -> None:
        """Vote before a batch.

        Raises:
            EvalInterrupted: on all ranks.
        """
        self._vote(has_batches=True)

    def finish(self) -> None:
        """Keep voting after the last batch, or after an error, until all ranks are done.

        Raises:
            EvalInterrupted: on all ranks.
        """
        while not self._stopped and self._vote(has_batches=False):
            pass

    def _vote(self, has_batches: bool) -> bool:
        self._heartbeat.mark()
        if self._bar is not None:
            self._bar.update(0)  # redraws it: its clock shows that something happens
        self._stopped, any_has_batches = distributed.all_reduce_any(self._stop.requested(), has_batches)
        if self._stopped:
            raise EvalInterrupted
        return any_has_batches


@dataclass(frozen=True)
class Eval:
    """One evaluation. Whether it is due depends only on the step, so all ranks reach the same decision."""

    name: str
    every_steps: int
    measure: Callable[[int], Tensor]
    """At a step: sums over this rank's examples, on the CPU."""
    finish: Callable[[Tensor], dict[str, Any]]
    """From the sums over all ranks to the row's figures. If empty, no row is written. "components" has those of rows
    NAME/COMPONENT."""
    progress: Callable[[int], dict[str, dict[str, Any]]] = lambda step: {}
    """By component: what else its row says at a step."""

    def is_due(self, step: int, last_step: int) -> bool:
        return self.every_steps > 0 and (step % self.every_steps == 0 or step == last_step)


def build_evals(
    ctx: RunContext, model: Transformer, dataset: Dataset, tokenizer: Tokenizer, vote: StopVote
) -> list[Eval]:
    """The evaluations that the config enables and the data allow.

    Args:
        model: neither wrapped nor compiled.

    Raises:
        UserError: a validation set that is missing or does not fit the run.
    """
    config, dist, settings = ctx.config, ctx.dist, ctx.config.eval
    file = Path(settings.hellaswag_file) if settings.hellaswag_file else None
    options = EvalOptions(
        hellaswag_file=file, hellaswag_examples=settings.hellaswag_examples, tasks_examples=settings.tasks_examples
    )
    inputs = EvalInputs(config, tokenizer, dist, lambda: dataset, options, before_batch=vote)
    micro_batches = replace(inputs, batch_size=batch_plan(config, dist.world_size).micro_batch_size)

    def measure_samples(step: int) -> Tensor:
        if dist.is_rank_zero:
            _write_samples(ctx, LanguageModel(model, tokenizer), step, vote)
        return torch.zeros(1)

    validation = _build("validation", settings.validation_every_steps, ctx, model, micro_batches)
    if validation and isinstance(dataset, MixedDataset):
        validation = replace(validation, progress=partial(dataset.progress, config))
    sets = open_validation_sets(config, dataset, ctx.log)
    components = dataset.labels if isinstance(dataset, MixedDataset) else ()
    counted = config.train.early_stop_on
    if counted is not None and counted not in (*sets, *components):
        known = ", ".join((*sets, *components)) or "none: give some with --eval.validation-sets NAME=DATASET"
        raise UserError(f"train.early_stop_on is {counted!r}, which is no validation set of this run; known: {known}")

    def validation_set(name: str, held_out: Dataset) -> Eval | None:
        set_inputs = replace(micro_batches, load_dataset=lambda: held_out)
        evaluation = _build("validation", settings.validation_every_steps, ctx, model, set_inputs)
        return evaluation and replace(evaluation, name=f"validation/{name}")

    evals = [
        validation,
        *(validation_set(name, held_out) for name, held_out in sets.items()),
        _build("cloze", settings.cloze_every_steps, ctx, model, inputs),
        _build("hellaswag", settings.hellaswag_every_steps, ctx, model, inputs),
        *(_build(task, settings.tasks_every_steps, ctx, model, inputs) for task in settings.tasks),
        Eval("samples", settings.sample_every_steps, measure_samples, lambda _: {}),
    ]
    return [evaluation for evaluation in evals if evaluation and evaluation.every_steps]


def _build(task: str, every_steps: int, ctx: RunContext, model: Transformer, inputs: EvalInputs) -> Eval | None:
    """An evaluation of the registry; None if it is off or not possible."""
    if not every_steps:
        return None
    name = task.partition(":")[0]  # without a file
    try:
        evaluation = build(task, inputs)
    except Exception as error:  # any error, on all ranks together: no evaluation may stop training
        ctx.log(f"{name} skipped: {error}")
        return None
    protocol = {"protocol": cloze.PROTOCOL} if name == "cloze" else {}  # reports compare results of one protocol
    return Eval(name, every_steps, lambda _: evaluation.measure(model), lambda sums: evaluation.finish(sums) | protocol)


def _write_samples(ctx: RunContext, language_model: LanguageModel, step: int, vote: StopVote) -> None:
    settings = ctx.config.eval
    for index, prompt in enumerate(settings.sample_prompts):
        seed = ctx.config.train.seed + index
        sampling = SamplingParams(settings.sample_temperature, settings.sample_top_k, seed=seed)
        new_tokens = settings.sample_new_tokens
        (sample,) = complete(language_model, [prompt], new_tokens, sampling, on_text=lambda *_: vote())
        ctx.samples.append({"step": step, "prompt": prompt, "text": sample.text, "seed": sample.seed})
        if index == 0:
            ctx.log(f"sample at step {step:,}: {prompt!r} ... {sample.text[:100]!r}")


def run_eval(
    evaluation: Eval, ctx: RunContext, state: TrainState, model: Transformer, watch: ReferenceWatch, vote: StopVote
) -> dict[str, dict[str, Any]]:
    """Measure and write its row, and those of its components. An evaluation that fails is logged; training continues.

    Returns:
        rank 0's figures by the name of the row, on every rank; empty if the evaluation failed.

    Raises:
        EvalInterrupted: a stop was requested; no row is written.
    """
    name, started, sums, error = evaluation.name, time.perf_counter(), torch.zeros(1), None
    model.eval()
    try:
        with autocast(ctx.config, ctx.dist.device):
            sums = evaluation.measure(state.step)
    except EvalInterrupted:
        raise
    except Exception as raised:
        error = raised
    vote.finish()
    # All ranks must know before the sum below: a rank that failed would never join it.
    (failed,) = distributed.all_reduce_any(error is not None)
    if failed:
        reason = error or "on another rank"
        ctx.log(f"the {name} evaluation failed at step {state.step:,}: {reason}; training continues")
        return {}
    # Decisions such as early stopping follow from the figures, so every rank uses rank 0's, bit for bit.
    figures = distributed.broadcast_object(evaluation.finish(distributed.all_reduce_sum(sums)))
    components = figures.pop("components", {})
    if ctx.dist.is_rank_zero and figures:
        seconds = time.perf_counter() - started
        compared, remark = watch.compare(name, state.step, figures)
        row = {"kind": "eval", "name": name, "step": state.step, **figures, **compared, "seconds": seconds}
        ctx.metrics.append(row)
        ctx.log(eval_line(f"{name} at step {state.step:,}", figures, f" ({seconds:.1f} s)"))
        progress = evaluation.progress(state.step)
        for component, part in components.items():
            part |= progress.get(component, {})
            ctx.metrics.append({"kind": "eval", "name": f"{name}/{component}", "step": state.step, **part})
            ctx.log(eval_line(f"{name}/{component}", part))
        if remark:
            ctx.log(remark)
    rows = {f"{name}/{component}": part for component, part in components.items()}
    return {name: figures, **rows} if figures else {}


def eval_line(subject: str, figures: dict[str, Any], end: str = "") -> str:
    """The first figures of an evaluation, as many as fit into a line; metrics.jsonl has all."""
    texts = [f"{key} {value:{',' if isinstance(value, int) else '.4f'}}" for key, value in figures.items()]
    while True:
        line = f"{subject}: {', '.join(texts)}{end}"
        if len(line) <= LINE_WIDTH or len(texts) <= 1:
            return line
        texts.pop()
