"""Interactive text completion in the terminal, with a base model that was not trained to answer."""

import sys
from collections.abc import Iterator
from dataclasses import replace

from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError
from myllm.planning.flops import n_parameters

from .completion import TextStream
from .generate import LanguageModel, stream_tokens
from .sampling_params import SamplingParams

WELCOME = """{parameters:,} parameters, context {context:,} tokens.
This is a base model: it continues your text and does not answer questions.
/reset clears the text, /temperature 0.7 sets the temperature, /quit exits, Ctrl-C stops a reply."""
COMMANDS = "/reset, /temperature NUMBER, /quit"


def chat(language_model: LanguageModel, max_new_tokens: int, sampling: SamplingParams) -> None:
    """Read lines and stream continuations until the input ends.

    Args:
        sampling: reply n, counted from 0, has the seed `sampling.seed` + n.
    """
    sampling.check()
    model, tokenizer = language_model
    context = model.config.max_seq_len
    print(WELCOME.format(parameters=n_parameters(model.config), context=context))
    history: list[int] = [tokenizer.end_of_text]
    while (line := _read_line()) is not None:
        command, _, value = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            history = [tokenizer.end_of_text]
            print("text cleared")
        elif command == "/temperature":
            sampling = _set_temperature(sampling, value)
        elif command.startswith("/"):
            print(f"unknown command {command}; commands: {COMMANDS}")
        elif line:
            history += tokenizer.encode(line).tolist()
            # Leave space for the reply: otherwise generation drops half of the context to make it.
            history = history[-max(context - max_new_tokens, context // 2, 1) :]
            ids = stream_tokens(model, history, max_new_tokens, sampling, tokenizer.end_of_text)
            history += _print_reply(ids, tokenizer)
            sampling = replace(sampling, seed=(sampling.seed + 1) % 2**63)


def _print_reply(ids: Iterator[int], tokenizer: Tokenizer) -> list[int]:
    """Print a reply as it is generated; returns its tokens, as far as Ctrl-C let them come."""
    stream, reply = TextStream(tokenizer), []
    try:
        for token in ids:
            reply.append(token)
            print(stream.feed(token), end="", flush=True)
        print(stream.end(), end="")
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    return reply


def _read_line() -> str | None:
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:  # meant for a reply, but came just after its end
            print("\nto exit, type /quit or press Ctrl-D", flush=True)


def _set_temperature(sampling: SamplingParams, value: str) -> SamplingParams:
    try:
        changed = replace(sampling, temperature=float(value))
        changed.check()
    except (ValueError, UserError):
        print(f"{value!r} is not a temperature: give a number of at least 0, such as /temperature 0.7")
        return sampling
    print(f"temperature {changed.temperature}")
    return changed
