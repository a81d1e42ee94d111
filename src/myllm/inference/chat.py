"""A conversation in the terminal with a base model, which completes text and was never taught to answer."""

import sys
from collections.abc import Iterator
from dataclasses import replace

from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError
from myllm.files import write_text
from myllm.paths import user_path
from myllm.planning.flops import n_parameters

from .completion import stream_text
from .generate import stream_tokens
from .language_model import LanguageModel
from .sampling_params import SamplingParams

HELLO = """{parameters:,} parameters, context {context:,} tokens.
This is a base model: it continues your text, it does not answer.
/reset forgets the text so far, /temperature 0.7 sets how freely it writes, /save FILE writes the text to a file,
/quit leaves, Ctrl-C stops a reply."""
COMMANDS = "/reset, /temperature NUMBER, /save FILE and /quit"


def chat(language_model: LanguageModel, max_new_tokens: int, sampling: SamplingParams) -> None:
    """Read lines, stream continuations, until the input ends.

    Args:
        sampling: reply number n, counted from 0, has the seed `sampling.seed` + n.
    """
    sampling.check()
    model, tokenizer = language_model
    context = model.config.max_seq_len
    print(HELLO.format(parameters=n_parameters(model.config), context=context))
    history: list[int] = [tokenizer.end_of_text]
    written = ""
    while (line := _read_line()) is not None:
        command, _, value = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            history, written = [tokenizer.end_of_text], ""
            print("forgotten")
        elif command == "/temperature":
            sampling = replace(sampling, temperature=_temperature(value, sampling.temperature))
        elif command == "/save":
            _save(value.strip(), written)
        elif command.startswith("/"):
            print(f"unknown command {command}; there are {COMMANDS}")
        elif line:
            history += tokenizer.encode(line).tolist()
            # Room for the reply: generation would forget half the context at once to make it.
            history = history[-max(context - max_new_tokens, context // 2, 1) :]
            ids, text = _stream(
                stream_tokens(model, history, max_new_tokens, sampling, tokenizer.end_of_text), tokenizer
            )
            sampling = replace(sampling, seed=(sampling.seed + 1) % 2**63)
            history, written = history + ids, f"{written}{line}{text}\n"


def _stream(ids: Iterator[int], tokenizer: Tokenizer) -> tuple[list[int], str]:
    written: list[int] = []
    shown = ""

    def recorded() -> Iterator[int]:
        for token in ids:
            written.append(token)
            yield token

    try:
        for text in stream_text(recorded(), tokenizer):
            shown += text
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    return written, shown


def _read_line() -> str | None:
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:  # one that was meant for a reply may come just after its end
            print("\n/quit or Ctrl-D leaves", flush=True)


def _temperature(value: str, now: float) -> float:
    try:
        wanted = float(value)
        if not 0 <= wanted < float("inf"):
            raise ValueError
    except ValueError:
        print(f"{value!r} is no temperature: give a number of at least 0, such as /temperature 0.7")
        return now
    print(f"temperature {wanted}")
    return wanted


def _save(value: str, written: str) -> None:
    """Write your lines and the replies since the last /reset. A file that is there already is left alone."""
    if not value:
        print("save where? /save FILE")
        return
    try:
        path = user_path(value)
        if path.exists():
            print(f"{path} is there already; give another name")
            return
        write_text(path, written)
    except UserError as error:
        print(error)
        return
    except OSError as error:
        print(f"cannot write {value}: {error.strerror}")
        return
    print(f"saved {len(written):,} characters to {path}")
