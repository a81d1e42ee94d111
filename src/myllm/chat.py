"""A conversation in the terminal with a base model, which completes text and was never taught to answer."""

import codecs
import sys
from collections.abc import Iterable, Iterator

from .data.tokenizer import Tokenizer
from .generate import generate
from .model import Transformer

HELLO = """{parameters:,} parameters, context {context:,} tokens.
This is a base model: it continues your text, it does not answer.
/reset forgets the text so far, /temperature 0.7 sets how freely it writes, /quit leaves, Ctrl-C stops a reply."""


def chat(model: Transformer, tokenizer: Tokenizer, max_new_tokens: int, temperature: float, top_k: int) -> None:
    """Read lines, stream continuations, until the input ends."""
    print(HELLO.format(parameters=sum(p.numel() for p in model.parameters()), context=model.config.max_seq_len))
    history: list[int] = [tokenizer.end_of_text]
    turn = 0
    while (line := _read_line()) is not None:
        command, _, value = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            history = [tokenizer.end_of_text]
            print("forgotten")
        elif command == "/temperature":
            temperature = _temperature(value, temperature)
        elif command.startswith("/"):
            print(f"unknown command {command}; there are /reset, /temperature NUMBER and /quit")
        elif line:
            history += tokenizer.encode(line).tolist()
            # Room for the reply: generation would forget half the context at once to make it.
            history = history[-max(model.config.max_seq_len - max_new_tokens, model.config.max_seq_len // 2) :]
            turn += 1
            ids = generate(
                model, history, max_new_tokens,
                temperature=temperature, top_k=top_k, seed=turn, end_of_text=tokenizer.end_of_text,
            )  # fmt: skip
            history = history + _stream(ids, tokenizer)


def stream_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as it comes, held back while it ends in half a character."""
    # By bytes: some vocabularies' decode leaves out the space before a text's first word, which here is any word.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _stream(ids: Iterator[int], tokenizer: Tokenizer) -> list[int]:
    written: list[int] = []

    def recorded() -> Iterator[int]:
        for token in ids:
            written.append(token)
            yield token

    try:
        for text in stream_text(recorded(), tokenizer):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return written


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


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
