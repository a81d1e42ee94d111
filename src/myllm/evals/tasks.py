"""The tasks of `myllm eval`: each takes a model and the user's choices, and gives its settings and its figures."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from myllm import paths
from myllm.errors import UserError
from myllm.paths import user_path

if TYPE_CHECKING:
    from torch import Tensor

    from myllm.config import RunConfig
    from myllm.data.dataset import Dataset
    from myllm.data.tokenizer.base import Tokenizer
    from myllm.inference.load import LanguageModel
    from myllm.model.transformer import Transformer

Figures = dict[str, Any]
Measured = tuple[dict[str, Any], Figures]
"""What decides the figures beside the model, and the figures."""


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    folder: Path
    """Of the checkpoint."""
    home: Path
    """Where its results are kept."""
    step: int | None
    """Updates that made it; None: not known."""
    language_model: "LanguageModel"
    config: "RunConfig"
    """Of its training; all defaults where that is not known."""
    dataset_hash: str | None
    """Of the data set that it was trained on, if that is known."""

    @property
    def model(self) -> "Transformer":
        return self.language_model.model

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.language_model.tokenizer

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Choices:
    """How to measure: options of the command."""

    protocol: Literal["nanogpt", "lm-eval"]
    hellaswag_file: Path | None
    hellaswag_examples: int | None
    stride: int | None
    dataset: str | None
    batch_size: int


def measure(task: str, subject: Subject, choices: Choices) -> Measured:
    """Do one task.

    Raises:
        UserError: it cannot be done.
    """
    subject.model.eval()
    name, colon, file = task.partition(":")
    if colon:
        return OF_A_FILE[name](subject, choices, Path(file))
    return TASKS[name](subject, choices)


# -- how well it predicts ---------------------------------------------------------------------------------------------


def measure_validation(subject: Subject, choices: Choices) -> Measured:
    """The held-out tokens that training validated on."""
    from . import perplexity

    settings, sums = _held_out_sums(subject, choices)
    return settings, perplexity.finish(sums(subject.model))


def measure_cloze(subject: Subject, choices: Choices) -> Measured:
    """The examples that training made of the held-out text."""
    from . import cloze

    data, config, end = _held_out(subject, choices), subject.config, subject.tokenizer.end_of_text
    if reason := cloze.why_unavailable(data.val, end, subject.model.config.max_seq_len):
        raise UserError(reason)
    examples = cloze.make_examples(data.val, end, config.eval.cloze_examples, config.train.seed)
    sums = cloze.cloze_sums(subject.model.score, examples, subject.device, 0, 1)
    settings = {"dataset": data.name, "protocol": cloze.PROTOCOL}
    return settings, cloze.finish(sums, cloze.blind_accuracy(data.val, examples))


def measure_hellaswag(subject: Subject, choices: Choices) -> Measured:
    """HellaSwag by the chosen protocol."""
    from . import hellaswag
    from .hellaswag_data import load_examples

    examples = load_examples(choices.hellaswag_file, choices.hellaswag_examples)
    tokenizer, window = subject.tokenizer, subject.model.config.max_seq_len
    items = hellaswag.tokenize_examples(examples, tokenizer.encode, tokenizer.end_of_text, window, choices.protocol)
    score = subject.model.score_continuations
    sums = hellaswag.hellaswag_sums(score, items, subject.device, 0, 1, choices.batch_size)
    file = choices.hellaswag_file
    settings = {"protocol": choices.protocol, "examples": choices.hellaswag_examples or "all"}
    return settings | ({} if file is None else {"file": str(file)}), hellaswag.finish(sums)


def measure_text(subject: Subject, choices: Choices, file: Path) -> Measured:
    """A text by sliding window."""
    from . import perplexity

    settings, sums, n_bytes = _text_sums(subject, choices, file)
    return settings, perplexity.finish(sums(subject.model), n_bytes)


# -- how it writes, how fast, and what int8 costs ---------------------------------------------------------------------


def measure_generation(subject: Subject, choices: Choices) -> Measured:
    """Samples of fixed prompts; beside them people's text, where there is held-out text."""
    from . import sample_quality as writing

    texts = writing.prompts()
    sampling = asdict(writing.SAMPLING)
    settings = {name: sampling[name] for name in ("temperature", "top_k", "seed")}
    settings |= {"prompts": len(texts), "samples": writing.SAMPLES_PER_PROMPT, "new_tokens": writing.NEW_TOKENS}
    try:
        stream = _held_out(subject, choices).val
    except UserError:
        if choices.dataset is not None:  # asked for; else it is only a comparison
            raise
        stream = None
    made = writing.sample_prompts(
        subject.language_model, texts, writing.SAMPLES_PER_PROMPT, writing.NEW_TOKENS, batch_size=choices.batch_size
    )
    figures = writing.sample_metrics(made)
    end, count = subject.tokenizer.end_of_text, len(texts) * writing.SAMPLES_PER_PROMPT
    pieces = writing.held_out_samples(stream, end, count, writing.NEW_TOKENS) if stream else []
    theirs = {f"{name}_of_held_out": value for name, value in writing.variety(pieces).items()} if pieces else {}
    return settings, figures | theirs


def measure_speed(subject: Subject, choices: Choices) -> Measured:
    """Prefill, decode, time to the first token, memory."""
    from . import speed

    return _speed_settings(subject), speed.measure(subject.model)


def measure_quantisation(subject: Subject, choices: Choices, file: Path | None = None) -> Measured:
    """Float against int8, on held-out tokens or a text."""
    from . import quantization as quantisation

    if subject.model.quantized:
        raise UserError("this task makes the int8 weights itself, to compare: leave --int8 out")
    if file is None:
        settings, sums = _held_out_sums(subject, choices)
    else:
        settings, sums, _ = _text_sums(subject, choices, file)
    return settings | _speed_settings(subject), quantisation.compare(subject.model, sums)


def _speed_settings(subject: Subject) -> dict[str, Any]:
    import torch

    from myllm.distributed.device_info import device_name
    from myllm.inference.int8 import weight_dtype

    from . import speed

    prompt, new = speed.token_counts(subject.model.config.max_seq_len)
    return {
        "device": device_name(subject.device), "dtype": weight_dtype(subject.model), "threads": torch.get_num_threads(),
        "prompt_tokens": prompt, "new_tokens": new,
    }  # fmt: skip


TASKS: dict[str, Callable[[Subject, Choices], Measured]] = {
    "validation": measure_validation,
    "hellaswag": measure_hellaswag,
    "cloze": measure_cloze,
    "generation": measure_generation,
    "speed": measure_speed,
    "quantisation": measure_quantisation,
}
OF_A_FILE: dict[str, Callable[[Subject, Choices, Path], Measured]] = {
    "perplexity": measure_text,
    "quantisation": measure_quantisation,
}


# -- what they need ---------------------------------------------------------------------------------------------------

Sums = Callable[["Transformer"], "Tensor"]
"""What `perplexity.assess_sums` gives of a model and the tokens at hand."""


def _held_out_sums(subject: Subject, choices: Choices) -> tuple[dict[str, Any], Sums]:
    from myllm.data.sampler import count_sequences

    from .validation import validation_batches

    data, context = _held_out(subject, choices), subject.model.config.max_seq_len
    wanted = max(subject.config.eval.validation_tokens // context, 1)  # a run that never validates may ask for less
    n = min(wanted, count_sequences(data.val.tokens, context))
    if not n:
        raise UserError(f"the data set {data.name} holds out {data.val.tokens:,} tokens, fewer than the context")
    return {"dataset": data.name}, _sums(subject, lambda: validation_batches(data.val, n, context, choices.batch_size))


def _text_sums(subject: Subject, choices: Choices, file: Path) -> tuple[dict[str, Any], Sums, int]:
    """Settings, sums, and the text's length in bytes."""
    from myllm.data.sources.text_encoding import NotTextError, decode_text

    from .perplexity import window_batches, windows

    file = user_path(file)
    try:
        raw = file.read_bytes()
        text = decode_text(raw)
        ids = subject.tokenizer.encode(text)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except NotTextError as error:
        raise UserError(f"{file}: {error}") from None
    if not len(ids):
        raise UserError(f"{file} has no text; give a file with some")
    context = subject.model.config.max_seq_len
    stride = max(context // 2, 1) if choices.stride is None else choices.stride
    windows(len(ids), context, stride)  # a stride that cannot be is refused here
    settings = {"context": context, "stride": stride, "text_sha256": hashlib.sha256(raw).hexdigest()[:12]}
    sums = _sums(
        subject, lambda: window_batches(ids, subject.tokenizer.end_of_text, context, stride, choices.batch_size)
    )
    return settings, sums, len(text.encode())


def _sums(subject: Subject, batches: "Callable[[], Iterable[tuple[Tensor, Tensor]]]") -> Sums:
    import torch

    from .perplexity import perplexity_sums

    token_bytes = torch.from_numpy(subject.tokenizer.token_bytes())
    return lambda model: perplexity_sums(model.evaluate, batches(), token_bytes, subject.device)


def _held_out(subject: Subject, choices: Choices) -> "Dataset":
    """The data set that the model was trained on, or the one that the user names.

    Raises:
        UserError: it is not here, or is one of another vocabulary.
    """
    from myllm.data.dataset import find_dataset

    found = find_dataset(choices.dataset) if choices.dataset is not None else _trained_on(subject)
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
    from myllm.data.dataset import Dataset

    named = subject.config.data.dataset
    folders = [each.parent for each in paths.datasets().glob("[!.]*/manifest.json")]
    for folder in (*folders, *([user_path(named)] if named else [])):
        try:
            fingerprint = Dataset.read(folder).manifest.get("fingerprint")
        except UserError:  # another data set, damaged or gone, is no matter here
            continue
        if fingerprint is not None and fingerprint == subject.dataset_hash:
            return Dataset.open(folder)
    if subject.dataset_hash is None:
        raise UserError(
            f"{subject.folder} does not say what data it was trained on; name a data set with --dataset, or leave the "
            "task out"
        )
    raise UserError(
        f"the data set that {subject.folder} was trained on is not under {paths.datasets()}; name one that is with "
        "--dataset, or leave the task out"
    )
