"""`myllm eval`: what a trained model can do, as a table and as JSON."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from . import paths
from .errors import UserError, nearest
from .files import write_json

if TYPE_CHECKING:
    from .data.shards import Dataset
    from .data.tokenizer import Tokenizer
    from .model import Transformer

Positional = tyro.conf.Positional
Figures = dict[str, Any]

TEXT_TASK = "perplexity:"


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how."""

    folder: Path
    """Of the checkpoint."""
    model: "Transformer"
    tokenizer: "Tokenizer"
    dataset: str | None
    protocol: Literal["nanogpt", "lm-eval"]
    hellaswag_file: Path | None
    hellaswag_examples: int | None
    stride: int
    batch_size: int


def evaluate(
    model: Positional[str],
    tasks: tuple[str, ...] = ("validation", "hellaswag", "cloze"),
    protocol: Literal["nanogpt", "lm-eval"] = "nanogpt",
    hellaswag_file: Path | None = None,
    hellaswag_examples: int | None = None,
    stride: int | None = None,
    dataset: str | None = None,
    batch_size: int = 16,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Measure a trained model: held-out loss, HellaSwag, cloze, and the perplexity of any text.

    Args:
        model: a run's name or folder (its newest intact checkpoint), or any folder that holds a checkpoint.
        tasks: any of validation, hellaswag, cloze and perplexity:FILE, a text of your own.
        protocol: how HellaSwag is scored. nanogpt: as build-nanogpt and llm.c do, acc_norm by the mean a token;
            lm-eval: as lm-evaluation-harness does, acc_norm by the character.
        hellaswag_file: a .jsonl or .parquet file of HellaSwag's rows; None: the Hub's, downloaded once.
        hellaswag_examples: the first so many; None: all.
        stride: tokens that perplexity scores a window, each with at least context - stride tokens before it; None:
            half of the context.
        dataset: held-out text for validation and cloze; None: that of the training.
        batch_size: sequences or examples at once.
        out: the JSON file; None: eval.json in the run's folder, or beside the checkpoint's files where it has no run.
        device: auto, cpu, cuda or mps.
    """
    from .loading import load_model
    from .run_folder import latest_checkpoint

    _check(tasks, batch_size, hellaswag_examples)
    folder = latest_checkpoint(model, paths.runs())  # once: a run that trains on saves others meanwhile
    loaded, tokenizer = load_model(folder, device)
    stride = max(loaded.config.max_seq_len // 2, 1) if stride is None else stride
    subject = Subject(
        folder, loaded, tokenizer, dataset, protocol, hellaswag_file, hellaswag_examples, stride, batch_size
    )
    results, faults = {}, []
    for task in dict.fromkeys(tasks):
        started = time.perf_counter()
        try:
            figures = _measure(task, subject)
        except UserError as error:  # the other tasks may still be done
            faults.append(f"{task}: {error}")
            continue
        results[task] = figures | {"seconds": round(time.perf_counter() - started, 2)}
    if results:
        print(table(results))
        print(_write(results, model, folder, out))
    if faults:
        raise UserError("\n".join(faults))


def _check(tasks: tuple[str, ...], batch_size: int, hellaswag_examples: int | None) -> None:
    if not tasks:
        raise UserError(f"no tasks; give any of {', '.join(TASKS)}, {TEXT_TASK}FILE")
    for task in tasks:
        if task not in TASKS and not (task.startswith(TEXT_TASK) and task != TEXT_TASK):
            known = [*TASKS, f"{TEXT_TASK}FILE"]
            raise UserError(f"unknown task {task!r}{nearest(task, known)}; there are {', '.join(known)}")
    for name, value in (("batch_size", batch_size), ("hellaswag_examples", hellaswag_examples)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")


def _measure(task: str, subject: Subject) -> Figures:
    subject.model.eval()
    if task.startswith(TEXT_TASK):
        return measure_text(Path(task.removeprefix(TEXT_TASK)), subject)
    return TASKS[task](subject)


# -- tasks ------------------------------------------------------------------------------------------------------------


def measure_validation(subject: Subject) -> Figures:
    """The held-out tokens that training validated on."""
    from .data.order import count_sequences
    from .evals import perplexity
    from .evals.validation import validation_batches

    data, config = _held_out(subject), _config(subject)
    context = subject.model.config.max_seq_len
    n = min(config.eval.validation_tokens // context, count_sequences(data.val.tokens, context))
    if not n:
        raise UserError(f"the data set {data.name} holds out {data.val.tokens:,} tokens, fewer than the context")
    batches = validation_batches(data.val, n, context, subject.batch_size)
    sums = perplexity.assess_sums(subject.model.assess, batches, _token_bytes(subject.tokenizer), _device(subject))
    return perplexity.finish(sums)


def measure_cloze(subject: Subject) -> Figures:
    """The examples that training made of the held-out text."""
    from .evals import cloze

    data, config = _held_out(subject), _config(subject)
    examples = cloze.make_examples(
        data.val, subject.tokenizer.end_of_text, config.eval.cloze_examples, config.train.seed
    )
    if not examples or subject.model.config.max_seq_len < cloze.CONTEXT_TOKENS + cloze.ENDING_TOKENS:
        raise UserError("it needs four held-out documents of at least 48 tokens, and a context of as many")
    return cloze.finish(cloze.cloze_sums(subject.model.score, examples, _device(subject), 0, 1))


def measure_hellaswag(subject: Subject) -> Figures:
    """HellaSwag by the chosen protocol."""
    from .evals import hellaswag
    from .evals.hellaswag_data import load_examples

    examples = load_examples(subject.hellaswag_file, subject.hellaswag_examples)
    tokenizer, window = subject.tokenizer, subject.model.config.max_seq_len
    items = hellaswag.make_items(examples, tokenizer.encode, tokenizer.end_of_text, window, subject.protocol)
    score = subject.model.score_continuations
    sums = hellaswag.hellaswag_sums(score, items, _device(subject), 0, 1, subject.batch_size)
    return hellaswag.finish(sums) | {"protocol": subject.protocol}


def measure_text(file: Path, subject: Subject) -> Figures:
    """A text by sliding window."""
    from .evals import perplexity

    file = file.expanduser()
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}; convert it first") from None
    ids = subject.tokenizer.encode(text)
    if not len(ids):
        raise UserError(f"{file} has no text; give a file with some")
    context = subject.model.config.max_seq_len
    batches = perplexity.window_batches(ids, subject.tokenizer.end_of_text, context, subject.stride, subject.batch_size)
    sums = perplexity.assess_sums(subject.model.assess, batches, _token_bytes(subject.tokenizer), _device(subject))
    return perplexity.finish(sums, len(text.encode())) | {"context": context, "stride": subject.stride}


TASKS: dict[str, Callable[[Subject], Figures]] = {
    "validation": measure_validation,
    "hellaswag": measure_hellaswag,
    "cloze": measure_cloze,
}


# -- what they need ---------------------------------------------------------------------------------------------------


def _device(subject: Subject) -> Any:
    return next(subject.model.parameters()).device


def _token_bytes(tokenizer: "Tokenizer") -> Any:
    import torch

    return torch.from_numpy(tokenizer.token_bytes())


def _config(subject: Subject) -> Any:
    from .config import RunConfig, from_dict

    return from_dict(json.loads((subject.folder / "config.json").read_text(encoding="utf-8")), RunConfig())


def _held_out(subject: Subject) -> "Dataset":
    """The data set that the model was trained on, or the one that the user names.

    Raises:
        UserError: it is not here, or is one of another vocabulary.
    """
    from .data.shards import find_dataset

    found = find_dataset(subject.dataset) if subject.dataset is not None else _trained_on(subject)
    made_with = found.manifest["tokenizer"]
    if made_with["sha256"] != subject.tokenizer.sha256:
        raise UserError(
            f"the data set {found.name} was made with the vocabulary {made_with['name']}, the model was trained with "
            f"{subject.tokenizer.name}; name another with --dataset"
        )
    return found


def _trained_on(subject: Subject) -> "Dataset":
    """
    Raises:
        UserError: it is not here, or damaged.
    """
    from .data.shards import Dataset

    wanted = json.loads((subject.folder / "state.json").read_text(encoding="utf-8"))["data"]["dataset_hash"]
    named = _config(subject).data.dataset
    folders = [each.parent for each in paths.datasets().glob("[!.]*/manifest.json")]
    for folder in (*folders, *([Path(named).expanduser()] if named else [])):
        try:
            fingerprint = Dataset.read(folder).manifest.get("fingerprint")
        except UserError:  # another data set, damaged or gone, is no matter here
            continue
        if fingerprint == wanted:
            return Dataset.open(folder)
    raise UserError(
        f"the data set that {subject.folder} was trained on is not under {paths.datasets()}; name one that is with "
        "--dataset, or leave the task out"
    )


# -- what comes out ---------------------------------------------------------------------------------------------------


def table(results: dict[str, Figures]) -> str:
    """A line a figure, by task."""
    lines = [(task, name, _shown(value)) for task, figures in results.items() for name, value in figures.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _write(results: dict[str, Figures], where: str, folder: Path, out: Path | None) -> Path:
    if out is None:
        home = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        out = home / "eval.json"
    step = json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"]
    try:
        out.expanduser().parent.mkdir(parents=True, exist_ok=True)
        write_json(out.expanduser(), {"model": where, "checkpoint": str(folder), "step": step, "tasks": results})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; give another file with --out") from None
    return out
