"""`myllm eval`: evaluate a trained model; results as a table and as JSON."""

import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from myllm import paths
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError
from myllm.evals import registry
from myllm.evals.registry import EvalInputs, EvalOptions
from myllm.paths import check_writable, unwritable_reason, user_path
from myllm.runs import eval_results
from myllm.runs.eval_results import Result

from .sample import ModelArgs, Source

if TYPE_CHECKING:
    from myllm.inference.load import ModelSource
    from myllm.model.transformer import Transformer

DEFAULT_TASKS = ("validation", "hellaswag", "cloze")
SKIPPABLE = ("hellaswag", "cloze")
"""Default tasks that are skipped where they are not possible: no network, or a context that is too short."""


def evaluate(
    source: Source,
    options: Annotated[EvalOptions, tyro.conf.arg(name="")],
    tasks: tuple[str, ...] = (),
    batch_size: int = 16,
    out: Path | None = None,
) -> None:
    """Evaluate a trained model: loss, HellaSwag and other public tasks, cloze, perplexity, speed.

    Args:
        tasks: validation, hellaswag, cloze; arc-easy, arc-challenge, piqa, openbookqa, winogrande, lambada, or one of
            them with its rows, such as piqa:FILE (.jsonl or .parquet); perplexity:FILE, of a text file; generation,
            statistics of samples from fixed prompts; speed; quantization, float against int8 weights on the held-out
            text; quantization:FILE, on a text file. Default: validation, hellaswag and cloze, of which the last two are
            skipped if not possible.
        batch_size: sequences, examples or samples in one batch.
        out: JSON file to add the results to (default: eval.json in the run's folder, beside the files of a checkpoint
            that has no run, or in the current folder for other models).
    """
    for task in tasks:
        registry.check_task(task)
    counts = {"batch_size": batch_size, "hellaswag_examples": options.hellaswag_examples}
    for name, value in (counts | {"tasks_examples": options.tasks_examples}).items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
    paths.check_model_path(source.model)  # importing torch takes seconds
    if options.dataset is not None:
        from myllm.data.find import find_dataset_folder

        find_dataset_folder(options.dataset)
    subject = _load(source, options, batch_size)
    file = subject.source.home / "eval.json" if out is None else user_path(out)
    eval_results.read(file)  # fail before the evaluations, which may take hours
    if out is not None:
        check_writable(file, "--out")
    elif reason := unwritable_reason(file):
        print(f"note: cannot write {file} ({reason}): results are only printed; --out saves them", file=sys.stderr)
    protect_output(keep_going=True)  # results are saved even if the reader of stdout, such as `head`, has exited
    skippable = () if tasks else tuple(task for task in SKIPPABLE if task != "hellaswag" or not options.hellaswag_file)
    _run_all(tasks or DEFAULT_TASKS, skippable, subject, file)


def _run_all(tasks: tuple[str, ...], skippable: tuple[str, ...], subject: "Subject", file: Path) -> None:
    """Run, print and save one task after the other.

    Raises:
        UserError: a task failed or could not be saved. Raised after all other tasks.
    """
    measured: list[Result] = []
    saved, errors = 0, []

    def show_and_save(result: Result) -> None:
        nonlocal saved
        print(eval_results.table(result), flush=True)  # printed before it is saved, so that it is never lost
        try:
            eval_results.add(file, result)
            saved += 1
        except UserError as error:
            errors.append(f"{result.task} was printed, but not saved: {error}")

    for task in dict.fromkeys(tasks):
        print(f"evaluating {task}", file=sys.stderr, flush=True)
        try:
            measured.append(subject.run(task))
        except UserError as error:
            if task in skippable:
                print(f"skipped {task}: {error}", file=sys.stderr)
            else:
                errors.append(f"{task}: {error}")
            continue
        show_and_save(measured[-1])
    if summary := eval_results.summarize(measured):
        show_and_save(summary)
    if saved:
        print(file)
    if errors or not measured:
        raise UserError("\n".join(errors) or "no task was possible")


@dataclass(frozen=True)
class Subject:
    """The model to evaluate."""

    source: "ModelSource"
    model: "Transformer"
    inputs: EvalInputs

    def run(self, task: str) -> Result:
        from myllm.distributed.device_info import device_name

        started, inputs = time.perf_counter(), self.inputs
        evaluation = registry.build(task, inputs)
        metrics = evaluation.finish(evaluation.measure(self.model))
        for component, part in metrics.pop("components", {}).items():  # of a mixture
            metrics |= {f"{component}/{name}": value for name, value in part.items()}
        return Result(
            task, str(self.source.folder), self.source.step, inputs.weights, evaluation.settings, metrics,
            device_name(inputs.dist.device), round(time.perf_counter() - started, 2),
        )  # fmt: skip


def _load(args: ModelArgs, options: EvalOptions, batch_size: int) -> Subject:
    from myllm.distributed.collectives import DistContext
    from myllm.evals.validation import held_out_dataset
    from myllm.inference.int8 import weight_dtype
    from myllm.inference.load import find_model, load_model

    source = find_model(args.model)  # only once: a run in progress saves newer checkpoints
    model, tokenizer = load_model(source, args.device, args.int8, args.precision)
    inputs = EvalInputs(
        config=replace(source.config, model=model.config),
        tokenizer=tokenizer,
        dist=DistContext(rank=0, local_rank=0, world_size=1, device=next(model.parameters()).device),
        load_dataset=cache(lambda: held_out_dataset(source, tokenizer, options.dataset)),
        options=options,
        batch_size=batch_size,
        weights=weight_dtype(model),
    )
    return Subject(source, model, inputs)
