"""Text from text: used by notebooks, `myllm sample`, `myllm chat` and evaluations."""

import codecs
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, overload

from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError

from .generate import FinishReason, LanguageModel, Sequence, generate_batch
from .sampling_params import SamplingParams

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    """One finished sample."""

    prompt: str
    text: str
    """Text after the prompt, up to a stop string or the end of the document, without either."""
    tokens: int
    """Generated tokens, with those of a stop string but without end-of-text."""
    finish_reason: FinishReason
    seed: int


class TextStream:
    """Turns tokens into text as they arrive. Incomplete characters and possible stop strings are held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        # By bytes: the decode of some vocabularies drops the space before the first word of a text.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is final after this token; always empty once `stopped`."""
        return self._release(self.decoder.decode(self.tokenizer.decode_bytes([token])), last=False)

    def end(self) -> str:
        """The text held back; call it after the last token."""
        return self._release(self.decoder.decode(b"", final=True), last=True)

    def _release(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        found = [start for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_partial_stop(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _partial_stop(text: str, stop: str) -> int:
    """How many characters at the end of the text are a prefix of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class _Sample:
    """A sample in progress."""

    number: int
    prompt: str
    sequence: Sequence
    stream: TextStream
    on_text: OnText
    text: str = ""

    def append(self, text: str) -> None:
        if text:
            self.text += text
            self.on_text(self.number, text)

    def finish(self) -> Completion:
        self.append(self.stream.end())
        sequence = self.sequence
        assert sequence.finish_reason is not None
        return Completion(self.prompt, self.text, len(sequence.generated), sequence.finish_reason, sequence.seed)


def complete(
    model: LanguageModel,
    prompts: list[str],
    max_new_tokens: int = 100,
    sampling: SamplingParams | None = None,
    *,
    stop: Iterable[str] = (),
    num_samples: int = 1,
    batch_size: int = 16,
    on_text: OnText = lambda number, text: None,
) -> Iterator[Completion]:
    """Continue each prompt `num_samples` times, in order. An empty prompt starts a new document.

    Yields a sample when it and all earlier ones are finished. Sample n of every prompt has the seed
    `sampling.seed` + n, so its text does not depend on the other prompts.

    Args:
        stop: end a sample before the first of these strings.
        batch_size: samples generated together.
        on_text: called with the number of a sample and its new text, as it is generated.

    Raises:
        UserError: invalid settings. Raised at the call.
    """
    sampling, stop = sampling or SamplingParams(), tuple(stop)
    sampling.check()
    for name, value, minimum in (
        ("num_samples", num_samples, 1), ("batch_size", batch_size, 1), ("max_new_tokens", max_new_tokens, 0)
    ):  # fmt: skip
        if value < minimum:
            raise UserError(f"{name} is {value}, but must be at least {minimum}")
    replace(sampling, seed=sampling.seed + num_samples - 1).check()
    if "" in stop:
        raise UserError("a stop string is empty, which would end every text at once; remove it")
    jobs = [(prompt, sampling.seed + number) for prompt in prompts for number in range(num_samples)]

    def run_batch(first: int) -> Iterator[Completion]:
        batch = [
            _Sample(number, prompt, Sequence(model.tokenizer.encode_document(prompt).tolist(), seed),
                    TextStream(model.tokenizer, stop), on_text)
            for number, (prompt, seed) in enumerate(jobs[first : first + batch_size], first)
        ]  # fmt: skip
        return _complete_batch(model, batch, max_new_tokens, sampling)

    return chain.from_iterable(map(run_batch, range(0, len(jobs), batch_size)))


def _complete_batch(
    model: LanguageModel, batch: list[_Sample], max_new_tokens: int, sampling: SamplingParams
) -> Iterator[Completion]:
    samples = {id(sample.sequence): sample for sample in batch}
    unfinished = deque(batch)

    def finished() -> Iterator[Completion]:
        while unfinished and unfinished[0].sequence.finish_reason is not None:
            yield unfinished.popleft().finish()

    sequences = [sample.sequence for sample in batch]
    for sequence in generate_batch(model.model, sequences, max_new_tokens, sampling, model.tokenizer.end_of_text):
        sample = samples[id(sequence)]
        sample.append(sample.stream.feed(sequence.generated[-1]))
        if sample.stream.stopped:
            sequence.finish_reason = "stop"
        yield from finished()
    yield from finished()


@overload
def generate(
    model: LanguageModel, prompt: str, max_new_tokens: int = ..., *, stop: str | Iterable[str] = ..., **settings: float
) -> str: ...
@overload
def generate(
    model: LanguageModel,
    prompt: list[str],
    max_new_tokens: int = ...,
    *,
    stop: str | Iterable[str] = ...,
    **settings: float,
) -> list[str]: ...
def generate(
    model: LanguageModel,
    prompt: str | list[str],
    max_new_tokens: int = 100,
    *,
    stop: str | Iterable[str] = (),
    **settings: float,
) -> str | list[str]:
    """A prompt with its continuation. Several prompts are continued in one batch.

    Args:
        settings: fields of `SamplingParams`, such as temperature=0.7, top_p=0.9, seed=1.

    Raises:
        UserError: an unknown setting, or one out of range.
    """
    known = SamplingParams.__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"unknown setting {', '.join(unknown)}; settings: {', '.join(known)}, stop")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    stops = [stop] if isinstance(stop, str) else list(stop)
    fields: dict[str, Any] = settings  # two of them are integers
    completions = complete(model, prompts, max_new_tokens, SamplingParams(**fields), stop=stops)
    texts = [completion.prompt + completion.text for completion in completions]
    return texts[0] if isinstance(prompt, str) else texts
