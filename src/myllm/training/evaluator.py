"""The evaluations of a training run, as a plain list: what, how often, and how its rows are written."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.sampler import count_sequences
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.precision import autocast
from myllm.errors import UserError
from myllm.evals import cloze, hellaswag, perplexity
from myllm.evals.hellaswag_data import load_examples
from myllm.evals.validation import validation_batches
from myllm.inference.completion import complete
from myllm.inference.language_model import LanguageModel
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer
from myllm.runs.heartbeat import Heartbeat
from myllm.runs.logs import JsonlFile, Log
from myllm.runs.reference_curve import ReferenceWatch

from .stop_signals import StopRequest


class EvalInterrupted(Exception):
    """All ranks were asked to stop in the middle of an evaluation. It is done again after the resume."""


class StopVote:
    """Ranks agree, batch by batch, whether to stop. One that has done its share votes on until all have, so it does not
    matter how many batches each has, and all leave after the same vote."""

    def __init__(self, stop: StopRequest, heartbeat: Heartbeat) -> None:
        self._stop, self._heartbeat, self._stopped = stop, heartbeat, False

    def __call__(self) -> None:
        """Before each batch.

        Raises:
            Interrupted: on all ranks alike.
        """
        self._vote(at_work=True)

    def finish(self) -> None:
        """After the last batch, also where an error made it the last.

        Raises:
            Interrupted: on all ranks alike.
        """
        while not self._stopped and self._vote(at_work=False):
            pass

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a vote before each call."""

        def polled(*arguments: Any) -> Any:
            self()
            return function(*arguments)

        return polled

    def _vote(self, at_work: bool) -> bool:
        self._heartbeat.mark()
        self._stopped, working = distributed.all_reduce_any(self._stop.requested(), at_work)
        if self._stopped:
            raise EvalInterrupted
        return working


@dataclass(frozen=True)
class Eval:
    """One evaluation. Whether it is due depends on the step alone, so every rank agrees."""

    name: str
    every_steps: int
    measure: Callable[[int], Tensor]
    """Sums over this rank's share at a step, on the CPU."""
    finish: Callable[[Tensor], dict[str, float]]
    """Figures from the sums over all ranks; no figures, no row."""

    def due(self, step: int, max_steps: int) -> bool:
        return self.every_steps > 0 and (step % self.every_steps == 0 or step == max_steps)


def build_evals(
    config: RunConfig,
    model: Transformer,
    dataset: Dataset,
    tokenizer: Tokenizer,
    process: DistContext,
    samples: JsonlFile,
    log: Log,
    poll: StopVote,
) -> list[Eval]:
    """Every evaluation that the config asks for and the data allow. `model` is the bare one: no wrapper, no compile."""
    settings, share = config.eval, (process.rank, process.world_size)
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    seq_len = config.model.max_seq_len
    n_sequences = min(settings.validation_tokens // seq_len, count_sequences(dataset.val.tokens, seq_len))

    def measure_validation(_: int) -> Tensor:
        batches = validation_batches(dataset.val, n_sequences, seq_len, config.train.micro_batch_size, *share)
        return perplexity.perplexity_sums(poll.before(model.evaluate), batches, token_bytes, process.device)

    def measure_samples(step: int) -> Tensor:
        if process.is_rank_zero:
            _write_samples(config, model, tokenizer, step, samples, log, poll)
        return torch.zeros(1)

    return [
        Eval("validation", settings.validation_every_steps, measure_validation, perplexity.finish),
        *_cloze(config, model, dataset, tokenizer, process, log, poll),
        *_hellaswag(config, model, tokenizer, process, log, poll),
        Eval("samples", settings.sample_every_steps, measure_samples, lambda _: {}),
    ]


def _cloze(
    config: RunConfig,
    model: Transformer,
    dataset: Dataset,
    tokenizer: Tokenizer,
    process: DistContext,
    log: Log,
    poll: StopVote,
) -> list[Eval]:
    """Cloze, where it is asked for and context and held-out text are long enough; one line where they are not."""
    settings, end = config.eval, tokenizer.end_of_text
    if not settings.cloze_every_steps:
        return []
    if reason := cloze.why_unavailable(dataset.val, end, config.model.max_seq_len):
        log(f"no cloze, training goes on without: {reason}")
        return []
    examples = cloze.make_examples(dataset.val, end, settings.cloze_examples, config.train.seed)
    blind = cloze.blind_accuracy(dataset.val, examples)

    def measure(_: int) -> Tensor:
        score = poll.before(model.score)
        return cloze.cloze_sums(score, examples, process.device, process.rank, process.world_size)

    def finish(sums: Tensor) -> dict[str, float]:
        return cloze.finish(sums, blind) | {"protocol": cloze.PROTOCOL}

    return [Eval("cloze", settings.cloze_every_steps, measure, finish)]


def _hellaswag(
    config: RunConfig, model: Transformer, tokenizer: Tokenizer, process: DistContext, log: Log, poll: StopVote
) -> list[Eval]:
    """HellaSwag, where it is asked for and its data can be had; one line where they cannot."""
    settings = config.eval
    if not settings.hellaswag_every_steps:
        return []
    examples, fault = [], ""
    if process.is_rank_zero:  # the others, on other machines too, get what it read
        try:
            examples = load_examples(settings.hellaswag_file, settings.hellaswag_examples)
        except Exception as error:  # whatever it is: the other ranks wait, and no evaluation costs training
            fault = str(error)
    examples, fault = distributed.broadcast_object((examples, fault))
    try:
        window = config.model.max_seq_len
        items = hellaswag.tokenize_examples(examples, tokenizer.encode, tokenizer.end_of_text, window)
    except UserError as error:
        items, fault = [], str(error)
    if not items:
        log(f"no HellaSwag, training goes on without: {fault}")
        return []

    def measure(_: int) -> Tensor:
        score = poll.before(model.score_continuations)
        return hellaswag.hellaswag_sums(score, items, process.device, process.rank, process.world_size)

    return [Eval("hellaswag", settings.hellaswag_every_steps, measure, hellaswag.finish)]


def _write_samples(
    config: RunConfig, model: Transformer, tokenizer: Tokenizer, step: int, samples: JsonlFile, log: Log, poll: StopVote
) -> None:
    sampling = SamplingParams(config.eval.sample_temperature, config.eval.sample_top_k)
    pair = LanguageModel(model, tokenizer)
    for number, prompt in enumerate(config.eval.sample_prompts):
        each = replace(sampling, seed=config.train.seed + number)
        new_tokens, on_text = config.eval.sample_new_tokens, lambda *_: poll()
        (made,) = complete(pair, [prompt], new_tokens, each, on_text=on_text)
        samples.append({"step": step, "prompt": prompt, "text": made.text, "seed": made.seed})
        if number == 0:
            log(f"sample at step {step:,}: {prompt!r} ... {made.text[:100]!r}")


def run_eval(
    each: Eval,
    state: TrainState,
    model: Transformer,
    config: RunConfig,
    process: DistContext,
    watch: ReferenceWatch,
    metrics: JsonlFile,
    log: Log,
    poll: StopVote,
) -> dict[str, float]:
    """Measure and write one row. A failing evaluation is reported and never costs training.

    Returns:
        the figures, rank 0's on every rank; empty if it failed.

    Raises:
        Interrupted: the run was asked to stop; no row is written.
    """
    started, sums, failure = time.perf_counter(), torch.zeros(1), None
    model.eval()
    try:
        with autocast(config, process.device):
            sums = each.measure(state.step)
    except EvalInterrupted:
        raise
    except Exception as error:
        failure = error
    poll.finish()
    # Every rank asks, so that none waits for a sum that another never sends.
    (failed,) = distributed.all_reduce_any(failure is not None)
    if failed:
        reason = failure or "on another rank"
        log(f"the {each.name} evaluation failed at step {state.step:,}: {reason}; training goes on")
        return {}
    # The same sums everywhere; rank 0's figures all the same, since what is decided by them must not differ in a bit.
    figures = distributed.broadcast_object(each.finish(distributed.all_reduce_sum(sums)))
    if process.is_rank_zero and figures:
        seconds = time.perf_counter() - started
        compared, remark = watch.compare(each.name, state.step, figures)
        row = {"kind": "eval", "name": each.name, "step": state.step, **figures, **compared, "seconds": seconds}
        metrics.append(row)
        shown = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in figures.items())
        log(f"{each.name} at step {state.step:,}: {shown} ({seconds:.1f} s)")
        if remark:
            log(remark)
    return figures
