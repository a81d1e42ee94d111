"""`myllm eval`: evaluate a trained model; results as a table and as JSON."""

import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from myllm import paths
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError
from myllm.evals import registry, results
from myllm.evals.registry import EvalInputs, EvalOptions
from myllm.evals.results import Result
from myllm.paths import check_writable, unwritable_reason, user_path

from .sample import ModelArgs, Source

if TYPE_CHECKING:
    from myllm.inference.load import LanguageModel, ModelSource

DEFAULT_TASKS = ("validation", "hellaswag", "cloze")
SKIPPABLE = ("hellaswag", "cloze")
"""Default tasks that are skipped where they are not possible: no network, or a context that is too short."""


@dataclass(frozen=True)
class Subject:
    """The model to evaluate."""

    source: "ModelSource"
    model: "LanguageModel"
    inputs: EvalInputs


def evaluate(
    source: Source,
    tasks: tuple[str, ...] = (),
    protocol: Literal["nanogpt", "lm-eval"] = "nanogpt",
    hellaswag_file: Path | None = None,
    hellaswag_examples: int | None = None,
    stride: int | None = None,
    dataset: str | None = None,
    batch_size: int = 16,
    out: Path | None = None,
) -> None:
    """Evaluate a trained model: loss, HellaSwag, cloze, perplexity, speed.

    Args:
        tasks: validation, hellaswag, cloze; perplexity:FILE, of a text file; generation, statistics of samples from
            fixed prompts; speed; quantization, float against int8 weights on the held-out text; quantization:FILE, on a
            text file. Default: validation, hellaswag and cloze, of which the last two are skipped if not possible.
        protocol: how to score HellaSwag. nanogpt: as build-nanogpt and llm.c, acc_norm by the mean over tokens;
            lm-eval: as lm-evaluation-harness, acc_norm by the number of characters.
        hellaswag_file: a .jsonl or .parquet file in HellaSwag's format (default: download it from the Hub once).
        hellaswag_examples: use only the first N (default: all).
        stride: tokens that perplexity scores in each window, each with at least context - stride tokens before it
            (default: half of the context).
        dataset: data set with the held-out text (default: the one that the model was trained on).
        batch_size: sequences, examples or samples in one batch.
        out: JSON file to add the results to (default: eval.json in the run's folder, beside the files of a checkpoint
            that has no run, or in the current folder for other models).
    """
    for task in tasks:
        registry.check_task(task)
    for name, value in (("batch_size", batch_size), ("hellaswag_examples", hellaswag_examples)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
    paths.check_model_path(source.model)  # importing torch takes seconds
    if dataset is not None:
        from myllm.data.dataset import find_dataset_folder

        find_dataset_folder(dataset)
    options = EvalOptions(protocol, hellaswag_file, hellaswag_examples, stride, dataset)
    subject = _load(source, options, batch_size)
    file = subject.source.home / "eval.json" if out is None else user_path(out)
    results.read(file)  # fail before the evaluations, which may take hours
    if out is not None:
        check_writable(file, "--out")
    elif reason := unwritable_reason(file):
        print(f"note: cannot write {file} ({reason}): results are only printed; --out saves them", file=sys.stderr)
    protect_output(keep_going=True)  # results are saved even if the reader of stdout, such as `head`, has exited
    if tasks:
        _run_all(tasks, (), subject, file)
    else:
        skippable = tuple(task for task in SKIPPABLE if task != "hellaswag" or hellaswag_file is None)
        _run_all(DEFAULT_TASKS, skippable, subject, file)


def _load(args: ModelArgs, options: EvalOptions, batch_size: int) -> Subject:
    from myllm.evals.validation import held_out_dataset
    from myllm.inference.int8 import weight_dtype
    from myllm.inference.load import find_model, load_model

    source = find_model(args.model)  # only once: a run in progress saves newer checkpoints
    loaded = load_model(source, args.device, args.int8, args.precision)
    inputs = EvalInputs(
        config=replace(source.config, model=loaded.model.config),
        tokenizer=loaded.tokenizer,
        device=next(loaded.model.parameters()).device,
        load_dataset=cache(lambda: held_out_dataset(source, loaded.tokenizer, options.dataset)),
        options=options,
        batch_size=batch_size,
        weights=weight_dtype(loaded.model),
    )
    return Subject(source, loaded, inputs)


def _run_all(tasks: tuple[str, ...], skippable: tuple[str, ...], subject: Subject, file: Path) -> None:
    """Run, print and save one task after the other.

    Raises:
        UserError: a task failed or could not be saved. Raised after all other tasks.
    """
    measured, saved, errors = 0, 0, []
    for task in dict.fromkeys(tasks):
        print(f"evaluating {task}", file=sys.stderr, flush=True)
        try:
            result = _run(task, subject)
        except UserError as error:
            if task in skippable:
                print(f"skipped {task}: {error}", file=sys.stderr)
            else:
                errors.append(f"{task}: {error}")
            continue
        print(results.table(result), flush=True)  # printed before it is saved, so that it is never lost
        measured += 1
        try:
            results.add(file, [result])
            saved += 1
        except UserError as error:
            errors.append(f"{task} was printed, but not saved: {error}")
    if saved:
        print(file)
    if errors or not measured:
        raise UserError("\n".join(errors) or "no task was possible")


def _run(task: str, subject: Subject) -> Result:
    from myllm.distributed.device_info import device_name

    started, inputs = time.perf_counter(), subject.inputs
    evaluation = registry.build(task, inputs)
    metrics = evaluation.finish(evaluation.measure(subject.model.model))
    return Result(
        task, str(subject.source.folder), subject.source.step, inputs.weights, evaluation.settings, metrics,
        device_name(inputs.device), round(time.perf_counter() - started, 2),
    )  # fmt: skip
