"""`myllm eval`: what a trained model can do, as a table and as JSON."""

import sys
import time
from pathlib import Path
from typing import Literal

import tyro

from myllm import paths
from myllm.console import open_output
from myllm.errors import UserError, nearest
from myllm.evals import results as eval_results
from myllm.evals.results import Result
from myllm.evals.tasks import OF_A_FILE, TASKS, Choices, Subject, measure
from myllm.files import check_writable, why_unwritable
from myllm.paths import user_path

USUAL = ("validation", "hellaswag", "cloze")
OPTIONAL = ("hellaswag", "cloze")
"""Of the usual tasks, what is no failure where it cannot be done: no network, or a context that is too short."""
Positional = tyro.conf.Positional


def evaluate(
    model: Positional[str],
    tasks: tuple[str, ...] = (),
    protocol: Literal["nanogpt", "lm-eval"] = "nanogpt",
    hellaswag_file: Path | None = None,
    hellaswag_examples: int | None = None,
    stride: int | None = None,
    dataset: str | None = None,
    batch_size: int = 16,
    out: Path | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    int8: bool = False,
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Evaluate a trained model: loss, HellaSwag, cloze, perplexity, speed.

    Args:
        model: a run's name or folder (its newest intact checkpoint), any folder that holds a checkpoint, an exported
            folder or another of transformers, or a model of the Hub: NAMESPACE/NAME, NAMESPACE/NAME@REVISION.
        tasks: none given: validation, hellaswag and cloze, of which the last two are skipped where they cannot be
            done. Any of these; perplexity:FILE, a text of your own; generation, figures of samples
            of fixed prompts; speed; quantisation, float weights against int8 on the held-out text, and
            quantisation:FILE on a text of your own.
        protocol: how HellaSwag is scored. nanogpt: as build-nanogpt and llm.c do, acc_norm by the mean a token;
            lm-eval: as lm-evaluation-harness does, acc_norm by the character.
        hellaswag_file: a .jsonl or .parquet file of HellaSwag's rows; None: the Hub's, downloaded once.
        hellaswag_examples: the first so many; None: all.
        stride: tokens that perplexity scores a window, each with at least context - stride tokens before it; None:
            half of the context.
        dataset: held-out text; None: that of the training.
        batch_size: sequences, examples or samples at once.
        out: the JSON file to add to; None: eval.json in the run's folder, or beside the checkpoint's files where it
            has no run, in the current folder for any other model.
        device: auto, cpu, cuda or mps.
        int8: measure with weights in eight bits, by torchao.
        precision: of matrix products; None: the training's own, as it is on this device.
    """
    named, tasks = bool(tasks), tasks or USUAL
    _check(tasks, batch_size, hellaswag_examples)
    paths.check_model(model)  # before the seconds that torch takes
    if dataset is not None:
        from myllm.data.dataset import find_dataset_folder

        find_dataset_folder(dataset)
    subject = resolve(model, device, int8, precision)
    file = subject.home / "eval.json" if out is None else user_path(out)
    eval_results.read(file)  # not after the hours that measuring takes
    if out is not None:
        check_writable(file, "--out")
    elif reason := why_unwritable(file):  # somebody else's run
        print(f"note: {file} cannot be written ({reason}): figures are only shown; --out keeps them", file=sys.stderr)
    open_output(keep_going=True)  # `| head` has had enough of the figures, and is no reason not to keep them
    choices = Choices(protocol, hellaswag_file, hellaswag_examples, stride, dataset, batch_size)
    _measure_all(tasks, named, subject, choices, file)


def _measure_all(tasks: tuple[str, ...], named: bool, subject: Subject, choices: Choices, file: Path) -> None:
    """Measure, show and keep, task by task.

    Raises:
        UserError: tasks that could not be done or kept, once all others are. Of the usual tasks, which nobody named,
            the optional ones may be skipped.
    """
    measured, kept, faults = 0, 0, []
    for task in dict.fromkeys(tasks):
        print(f"measuring {task}", file=sys.stderr, flush=True)
        try:
            result = _result(task, subject, choices)
        except UserError as error:  # the other tasks may still be done
            if named or task not in OPTIONAL or (task == "hellaswag" and choices.hellaswag_file):
                faults.append(f"{task}: {error}")
            else:
                print(f"skipped {task}: {error}", file=sys.stderr)
            continue
        print(eval_results.table([result]), flush=True)  # shown first: whatever becomes of the file, it is not lost
        measured += 1
        try:
            eval_results.add(file, [result])
            kept += 1
        except UserError as error:
            faults.append(f"{task} is not kept, only shown: {error}")
    if kept:
        print(file)
    if faults or not measured:
        raise UserError("\n".join(faults) or "nothing could be measured")


def resolve(where: str, device: str, int8: bool, precision: str | None = None) -> Subject:
    """What a user's word for a model means: its weights, and what is known of their training.

    Raises:
        UserError: nothing there, a damaged checkpoint, or no torchao for int8.
    """
    from myllm.inference.load import find_model, load_model

    origin = find_model(where)  # once: a run that trains on saves others meanwhile
    loaded = load_model(origin, device, int8, precision)
    return Subject(origin.folder, origin.home, origin.step, loaded, origin.config, origin.dataset_hash)


def _result(task: str, subject: Subject, choices: Choices) -> Result:
    from myllm.distributed.device_info import device_name
    from myllm.inference.int8 import weight_dtype

    started = time.perf_counter()
    settings, figures = measure(task, subject, choices)
    return Result(
        task, str(subject.folder), subject.step, weight_dtype(subject.model), settings, figures,
        device_name(subject.device), round(time.perf_counter() - started, 2),
    )  # fmt: skip


def _check(tasks: tuple[str, ...], batch_size: int, hellaswag_examples: int | None) -> None:
    known = [*TASKS, *(f"{name}:FILE" for name in OF_A_FILE)]
    for task in tasks:
        name, _, file = task.partition(":")
        if task not in TASKS and not (name in OF_A_FILE and file):
            raise UserError(f"unknown task {task!r}{nearest(task, known)}; there are {', '.join(known)}")
    for name, value in (("batch_size", batch_size), ("hellaswag_examples", hellaswag_examples)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
