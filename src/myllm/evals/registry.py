"""One table of evaluations, for training and for `myllm eval`.

    evaluation = build("hellaswag", inputs)  # reads its data; raises UserError if the evaluation is not possible
    sums = evaluation.measure(model)         # of this rank's share of the examples
    metrics = evaluation.finish(sums)        # of the sums over all ranks

To add a multiple-choice task, put it into tasks.TASKS. To add another evaluation, write a builder and put it into
EVALUATIONS. Builders import torch themselves, so that a command line with an unknown task is rejected at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm.errors import UserError, did_you_mean

from .tasks import TASKS, Protocol, Question, Task, nanogpt_hellaswag_question

if TYPE_CHECKING:
    from torch import Tensor

    from myllm.config import RunConfig
    from myllm.data.dataset import Dataset
    from myllm.data.mixture.mixed_dataset import MixedDataset
    from myllm.data.tokenizer.base import Tokenizer
    from myllm.distributed.collectives import DistContext
    from myllm.model.transformer import Transformer

    from .choice import TokenizedQuestion

Metrics = dict[str, Any]


@dataclass(frozen=True)
class EvalOptions:
    """Options of the command line."""

    protocol: Protocol = "nanogpt"
    """How to score HellaSwag. nanogpt: as build-nanogpt and llm.c, acc_norm by the mean over tokens; lm-eval: as
    lm-evaluation-harness, acc_norm by the number of characters."""
    hellaswag_file: Path | None = None
    """A .jsonl or .parquet file in HellaSwag's format. None: download it from the Hub once."""
    hellaswag_examples: int | None = None
    """Use only the first N. None: all."""
    tasks_examples: int | None = None
    """Use only the first N examples of each other public task, such as arc-easy. None: all."""
    stride: int | None = None
    """Tokens that perplexity scores in each window, each with at least context - stride tokens before it. None: half of
    the context."""
    dataset: str | None = None
    """Data set with the held-out text. None: the one that the model was trained on."""


@dataclass(frozen=True)
class EvalInputs:
    """Everything that builders need, except the model."""

    config: "RunConfig"
    """Of the training; its `model` is the config of the evaluated model."""
    tokenizer: "Tokenizer"
    dist: "DistContext"
    load_dataset: Callable[[], "Dataset"]
    """Opens the data set with the held-out text, or raises UserError."""
    options: EvalOptions = EvalOptions()
    batch_size: int = 16
    """Sequences, examples or samples in one batch."""
    weights: str = "float32"
    """As `weight_dtype` returns it."""
    before_batch: Callable[[], None] = lambda: None
    """Called before each batch. Training stops an evaluation by raising an error here."""

    @property
    def context(self) -> int:
        return self.config.model.max_seq_len

    def with_hook(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with `before_batch` before each call."""

        def call(*arguments: Any) -> Any:
            self.before_batch()
            return function(*arguments)

        return call


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that has its data."""

    settings: dict[str, Any]
    """What decides the metrics, besides the model."""
    measure: Callable[["Transformer"], Any]
    """This rank's part. In training: a CPU tensor, to be summed over ranks."""
    finish: Callable[[Any], Metrics]


def check_task(task: str) -> None:
    """
    Raises:
        UserError: no evaluation has this name.
    """
    name, _, file = task.partition(":")
    if task not in EVALUATIONS and not (name in FILE_EVALUATIONS and file):
        known = [*EVALUATIONS, *(f"{name}:FILE" for name in FILE_EVALUATIONS)]
        raise UserError(f"unknown task {task!r}{did_you_mean(task, known)}; tasks: {', '.join(known)}")


def check_training_tasks(tasks: tuple[str, ...]) -> None:
    """Check the names of `eval.tasks`.

    Raises:
        UserError: a name is unknown, given twice, or not a public task.
    """
    known = [name for name in TASKS if name != "hellaswag"]
    names = [task.partition(":")[0] for task in tasks]
    for name in names:
        if name not in known:
            raise UserError(
                f"eval.tasks has {name!r}{did_you_mean(name, known)}; expected some of {', '.join(known)}, or "
                "NAME:FILE with a task's rows. Other evaluations have settings of their own: eval.hellaswag_every_steps"
            )
    if len(set(names)) < len(names):
        raise UserError(f"eval.tasks has a task twice: {', '.join(tasks)}")


def build(task: str, inputs: EvalInputs) -> Evaluation:
    """Prepare an evaluation. Every rank calls it.

    Raises:
        UserError: the evaluation is not possible. Ranks raise together, though not always the same error.
    """
    name, _, file = task.partition(":")
    return FILE_EVALUATIONS[name](inputs, Path(file)) if file else EVALUATIONS[name](inputs)


def build_validation(inputs: EvalInputs) -> Evaluation:
    """Loss and accuracy on the held-out tokens."""
    from myllm.data.mixture.mixed_dataset import MixedDataset
    from myllm.data.sampler import count_sequences

    from . import perplexity
    from .validation import validation_batches

    dataset, context, dist = inputs.load_dataset(), inputs.context, inputs.dist
    if isinstance(dataset, MixedDataset):
        return _build_mixture_validation(inputs, dataset)
    # At least one sequence: a run that never validates may have validation_tokens below the context.
    wanted = max(inputs.config.eval.validation_tokens // context, 1)
    n_sequences = min(wanted, count_sequences(dataset.val.tokens, context))
    if not n_sequences:
        raise UserError(
            f"the data set {dataset.name} has {dataset.val.tokens:,} held-out tokens, fewer than the context of "
            f"{context:,}; use one with a larger data.val_tokens"
        )
    measure = _measure_perplexity(
        lambda: validation_batches(
            dataset.val, n_sequences, context, inputs.batch_size, dist.rank, dist.world_size
        ),
        inputs,
    )  # fmt: skip
    return Evaluation({"dataset": dataset.name}, measure, perplexity.finish)


def _build_mixture_validation(inputs: EvalInputs, dataset: "MixedDataset") -> Evaluation:
    """Each component's held-out tokens, in equal numbers, and their mean by the final weights. Its metrics have those
    of the components under "components"."""
    import torch

    from . import perplexity

    config = inputs.config
    tokens = config.eval.validation_tokens // len(dataset.components)
    share = replace(inputs, config=replace(config, eval=replace(config.eval, validation_tokens=tokens)))

    def evaluate(component: "Dataset") -> Evaluation:
        return build_validation(replace(share, load_dataset=lambda: component))

    parts = [evaluate(component) for component in dataset.components]

    def finish(sums: "Tensor") -> Metrics:
        components = {label: part.finish(row) for label, part, row in zip(dataset.labels, parts, sums, strict=True)}
        return perplexity.finish(perplexity.mix(sums, dataset.final_weights)) | {"components": components}

    return Evaluation(
        {"dataset": dataset.name}, lambda model: torch.stack([part.measure(model) for part in parts]), finish
    )


def build_perplexity(inputs: EvalInputs, file: Path) -> Evaluation:
    """Loss and accuracy on a text file, by sliding window."""
    from . import perplexity

    text = perplexity.read_text(file, inputs.tokenizer)
    context, dist, end_of_text = inputs.context, inputs.dist, inputs.tokenizer.end_of_text
    stride = max(context // 2, 1) if inputs.options.stride is None else inputs.options.stride
    perplexity.windows(len(text.tokens), context, stride)  # raises if the stride is invalid
    measure = _measure_perplexity(
        lambda: perplexity.window_batches(
            text.tokens, end_of_text, context, stride, inputs.batch_size, dist.rank, dist.world_size
        ),
        inputs,
    )
    settings = {"context": context, "stride": stride, "text_sha256": text.sha256[:12]}
    return Evaluation(settings, measure, lambda sums: perplexity.finish(sums, text.n_bytes))


def _measure_perplexity(
    batches: "Callable[[], Iterable[tuple[Tensor, Tensor]]]", inputs: EvalInputs
) -> "Callable[[Transformer], Tensor]":
    import torch

    from .perplexity import perplexity_sums

    token_bytes = torch.from_numpy(inputs.tokenizer.token_bytes())
    return lambda model: perplexity_sums(inputs.with_hook(model.evaluate), batches(), token_bytes, inputs.dist.device)


def build_cloze(inputs: EvalInputs) -> Evaluation:
    """Multiple choice from the held-out text."""
    from . import cloze

    dataset, end_of_text, config = inputs.load_dataset(), inputs.tokenizer.end_of_text, inputs.config
    examples = cloze.make_examples(dataset.val, end_of_text, config.eval.cloze_examples, config.train.seed)
    if reason := cloze.why_unavailable(examples, inputs.context):
        raise UserError(reason)
    blind = cloze.blind_accuracy(dataset.val, examples)
    settings = {"dataset": dataset.name, "protocol": cloze.PROTOCOL}
    return replace(_choice_evaluation(examples, settings, inputs), finish=lambda sums: cloze.finish(sums, blind))


def build_choice(name: str, inputs: EvalInputs, file: Path | None = None) -> Evaluation:
    """A task of tasks.py by lm-eval's protocol. Rank 0 reads the examples for all ranks."""
    from . import choice

    count, tokenizer = inputs.options.tasks_examples, inputs.tokenizer
    questions = _load_questions(inputs, name, file, count)
    digest = sha256(repr(questions).encode()).hexdigest()[:12]
    tokenized = choice.tokenize_questions(questions, tokenizer.encode, tokenizer.end_of_text, inputs.context)
    settings = {"protocol": "lm-eval", "examples": count or "all", "data_sha256": digest}
    return _choice_evaluation(tokenized, settings, inputs, TASKS[name].is_last_word)


def build_hellaswag(inputs: EvalInputs, file: Path | None = None) -> Evaluation:
    """HellaSwag by the chosen protocol."""
    from . import choice

    options, tokenizer, task = inputs.options, inputs.tokenizer, TASKS["hellaswag"]
    is_nanogpt, count, file = options.protocol == "nanogpt", options.hellaswag_examples, file or options.hellaswag_file
    if is_nanogpt:
        task = replace(task, question=nanogpt_hellaswag_question)
    questions = _load_questions(inputs, "hellaswag", file, count, task)
    tokenized = choice.tokenize_questions(
        questions, tokenizer.encode, tokenizer.end_of_text, inputs.context, separately=is_nanogpt
    )
    settings = {"protocol": options.protocol, "examples": count or "all"} | ({"file": str(file)} if file else {})
    return _choice_evaluation(tokenized, settings, inputs)


def _load_questions(
    inputs: EvalInputs, name: str, file: Path | None, count: int | None, task: Task | None = None
) -> list[Question]:
    """Questions that rank 0 reads, so that only one machine needs the network. Every rank calls it."""
    from myllm.distributed.collectives import broadcast_object

    from . import examples

    questions, error = [], None
    if inputs.dist.is_rank_zero:
        try:
            questions = examples.load_questions(name, file, count, task)
        except Exception as raised:  # the other ranks wait for the broadcast
            error = raised
    questions, message = broadcast_object((questions, error and str(error)))
    if message is not None:
        raise error or UserError(message)
    return questions


def _choice_evaluation(
    questions: "list[TokenizedQuestion]", settings: Metrics, inputs: EvalInputs, is_last_word: bool = False
) -> Evaluation:
    from . import choice

    def measure(model: "Transformer") -> "Tensor":
        if is_last_word:
            evaluate = inputs.with_hook(model.evaluate)
            return choice.last_word_sums(evaluate, questions, inputs.dist, inputs.batch_size)
        score = inputs.with_hook(model.score_continuations)
        return choice.choice_sums(score, questions, inputs.dist, inputs.batch_size)

    return Evaluation(settings, measure, choice.finish_last_word if is_last_word else choice.finish)


def build_generation(inputs: EvalInputs) -> Evaluation:
    """Statistics of samples from fixed prompts and, if there is held-out text, of that text. On one rank only."""
    from myllm.inference.generate import LanguageModel

    from . import sample_quality as quality

    prompts, per_prompt, new_tokens = quality.prompts(), quality.SAMPLES_PER_PROMPT, quality.NEW_TOKENS
    sampling = asdict(quality.SAMPLING)
    settings = {name: sampling[name] for name in ("temperature", "top_k", "seed")}
    settings |= {"prompts": len(prompts), "samples": per_prompt, "new_tokens": new_tokens}
    texts = []
    try:
        stream, count = inputs.load_dataset().val, len(prompts) * per_prompt
        texts = quality.held_out_samples(stream, inputs.tokenizer.end_of_text, count, new_tokens)
    except UserError:
        if inputs.options.dataset is not None:  # otherwise the comparison is optional
            raise
    variety = quality.variety(texts) if texts else {}
    of_held_out = {f"{name}_of_held_out": value for name, value in variety.items()}

    def measure(model: "Transformer") -> list[Any]:
        pair = LanguageModel(model, inputs.tokenizer)
        return list(quality.sample_prompts(pair, prompts, per_prompt, new_tokens, inputs.batch_size))

    return Evaluation(settings, measure, lambda samples: quality.sample_metrics(samples) | of_held_out)


def build_speed(inputs: EvalInputs) -> Evaluation:
    """Prefill and decode tokens per second, time to the first token, and memory. On one rank only."""
    import torch

    from myllm.distributed.device_info import device_name

    from . import speed

    prompt, new = speed.token_counts(inputs.context)
    settings = {
        "device": device_name(inputs.dist.device), "dtype": inputs.weights, "threads": torch.get_num_threads(),
        "prompt_tokens": prompt, "new_tokens": new,
    }  # fmt: skip
    return Evaluation(settings, speed.measure, dict)


def build_quantization(inputs: EvalInputs, file: Path | None = None) -> Evaluation:
    """Float against int8 weights, on held-out tokens or a text file. On one rank only."""
    from . import quantization

    if inputs.weights == "int8":
        raise UserError("quantization converts the weights to int8 itself; remove --int8")
    text = build_validation(inputs) if file is None else build_perplexity(inputs, file)
    settings = text.settings | build_speed(inputs).settings
    return Evaluation(settings, lambda model: quantization.compare(model, text.measure), dict)


CHOICE_EVALUATIONS: dict[str, Callable[..., Evaluation]] = {
    **{name: partial(build_choice, name) for name in TASKS},
    "hellaswag": build_hellaswag,
}
EVALUATIONS: dict[str, Callable[[EvalInputs], Evaluation]] = {
    "validation": build_validation,
    **CHOICE_EVALUATIONS,
    "cloze": build_cloze,
    "generation": build_generation,
    "speed": build_speed,
    "quantization": build_quantization,
}
FILE_EVALUATIONS: dict[str, Callable[[EvalInputs, Path], Evaluation]] = {
    "perplexity": build_perplexity,
    "quantization": build_quantization,
    **CHOICE_EVALUATIONS,
}
"""Evaluations of a file: `perplexity:FILE` of a text, `arc-easy:FILE` of a task's rows."""
