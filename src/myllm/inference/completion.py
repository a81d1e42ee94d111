"""Text from text: what notebooks, `myllm sample`, `myllm chat` and the evaluations call."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import overload

from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError

from .generate import FinishReason, Sequence, generate_batch
from .language_model import LanguageModel
from .sampling_params import SamplingParams


@dataclass(frozen=True)
class Completion:
    """One finished sample."""

    prompt: str
    text: str
    """What follows the prompt, up to a stop string or the end of the document, neither included."""
    tokens: int
    """Tokens drawn for the text; those of a stop string count, the end of the document does not."""
    finish_reason: FinishReason
    seed: int


class TextStream:
    """Text from tokens as they come: whole characters, and nothing that may yet turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        # By bytes: some vocabularies' decode leaves out the space before a text's first word, which here is any word.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain with this token. Once `stopped`, there is no more."""
        return self._release(self.decoder.decode(self.tokenizer.decode_bytes([token])), last=False)

    def end(self) -> str:
        """What was held back, now that no token follows."""
        return self._release(self.decoder.decode(b"", final=True), last=True)

    def _release(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_begun(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as it comes, held back while it ends in half a character."""
    stream = TextStream(tokenizer)
    for token in ids:
        if text := stream.feed(token):
            yield text
    if text := stream.end():
        yield text


def complete(
    model: LanguageModel,
    prompts: list[str],
    max_new_tokens: int = 100,
    sampling: SamplingParams | None = None,
    *,
    stop: list[str] = (),
    num_samples: int = 1,
    batch_size: int = 16,
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[Completion]:
    """Continue each prompt `num_samples` times, in order. An empty prompt begins a new document.

    Gives out a sample as soon as it and those before it are done. Sample n of every prompt has the seed
    `sampling.seed` + n, so its text does not depend on the other prompts.

    Args:
        stop: a sample ends before the first of these strings.
        batch_size: samples that are made together.
        on_text: called with the number of the sample and new text of it, as it comes.

    Raises:
        UserError: settings out of range, at the call.
    """
    sampling = sampling or SamplingParams()
    sampling.check()
    for name, value, least in (
        ("num_samples", num_samples, 1), ("batch_size", batch_size, 1), ("max_new_tokens", max_new_tokens, 0)
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} is {value}, but must be at least {least}")
    replace(sampling, seed=sampling.seed + num_samples - 1).check()
    if "" in stop:
        raise UserError("a stop string is empty: every text would end at once; leave it out")
    asked = [(prompt, sampling.seed + number) for prompt in prompts for number in range(num_samples)]
    groups = [(first, asked[first : first + batch_size]) for first in range(0, len(asked), batch_size)]
    on_text = on_text or (lambda *_: None)
    made = (_complete(model, *group, max_new_tokens, sampling, tuple(stop), on_text) for group in groups)
    return chain.from_iterable(made)


def _complete(
    model: LanguageModel,
    first: int,
    asked: list[tuple[str, int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    stop: tuple[str, ...],
    on_text: Callable[[int, str], None],
) -> Iterator[Completion]:
    """Samples that are made together; `first` is the number of the first one."""
    batch = [Sequence(model.tokenizer.encode_document(prompt).tolist(), seed) for prompt, seed in asked]
    streams = [TextStream(model.tokenizer, stop) for _ in batch]
    number = {id(row): index for index, row in enumerate(batch)}
    texts = [""] * len(batch)
    done = 0

    def give(index: int, text: str) -> None:
        if text:
            texts[index] += text
            on_text(first + index, text)

    def finished() -> Iterator[Completion]:
        nonlocal done
        while done < len(batch) and (finish_reason := batch[done].finish_reason) is not None:
            give(done, streams[done].end())
            prompt, seed = asked[done]
            yield Completion(prompt, texts[done], len(batch[done].generated), finish_reason, seed)
            done += 1

    for row in generate_batch(model.model, batch, max_new_tokens, sampling, model.tokenizer.end_of_text):
        index = number[id(row)]
        give(index, streams[index].feed(row.generated[-1]))
        if streams[index].stopped:
            row.finish_reason = "stop"
        yield from finished()
    yield from finished()


@overload
def generate(model: LanguageModel, prompt: str, max_new_tokens: int = ..., **settings: float) -> str: ...
@overload
def generate(model: LanguageModel, prompt: list[str], max_new_tokens: int = ..., **settings: float) -> list[str]: ...
def generate(
    model: LanguageModel,
    prompt: str | list[str],
    max_new_tokens: int = 100,
    *,
    stop: str | list[str] = (),
    **settings: float,
) -> str | list[str]:
    """A prompt and its continuation as one text; of several prompts, a list, made in one batch.

    Args:
        settings: fields of `Sampling`, such as temperature=0.7, top_p=0.9, seed=1.

    Raises:
        UserError: an unknown setting, or one out of range.
    """
    unknown = sorted(set(settings) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise UserError(f"unknown setting {', '.join(unknown)}; there are {known}, and stop")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    stops = [stop] if isinstance(stop, str) else list(stop)
    made = complete(model, prompts, max_new_tokens, SamplingParams(**settings), stop=stops)
    texts = [each.prompt + each.text for each in made]
    return texts[0] if isinstance(prompt, str) else texts
