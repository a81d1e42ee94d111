"""`myllm COMMAND`: everything but training itself. Each command is a function whose arguments are its options."""

import sys
from collections.abc import Callable

import tyro

from . import data_cli, eval_cli, tokenizer_cli
from .errors import UserError, nearest
from .launch import clear_errors

Positional = tyro.conf.Positional


def report(run: Positional[str]) -> None:
    """Draw a run's plots and its report.html anew.

    Args:
        run: its name, or its folder.
    """
    from .report import find_run, write_report

    print(write_report(find_run(run)))


def sample(
    model: Positional[str],
    prompt: str = "",
    num_samples: int = 3,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Continue a prompt.

    Args:
        model: a run's name or folder (its newest checkpoint), or a checkpoint's folder.
        prompt: text to continue; empty: start a new document.
        num_samples: how many continuations.
        max_new_tokens: of each; the end of the document ends it too.
        temperature: how freely to draw; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0: all.
        seed: of the first continuation; the next ones count up.
        device: auto, cpu, cuda or mps.
    """
    from .chat import stream_text
    from .generate import generate
    from .loading import load_model

    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}, but must be at least 1")
    loaded, tokenizer = load_model(model, device)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    for number in range(num_samples):
        if num_samples > 1:
            print(f"--- {number + 1}")
        print(prompt, end="", flush=True)
        tokens = generate(
            loaded, ids, max_new_tokens,
            temperature=temperature, top_k=top_k, seed=seed + number, end_of_text=tokenizer.end_of_text,
        )  # fmt: skip
        for text in stream_text(tokens, tokenizer):
            print(text, end="", flush=True)
        print()


def chat(
    model: Positional[str],
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    device: str = "auto",
) -> None:
    """Write with a model in the terminal: it continues what you type.

    Args:
        model: a run's name or folder (its newest checkpoint), or a checkpoint's folder.
        max_new_tokens: of each reply.
        temperature: how freely to draw; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0: all.
        device: auto, cpu, cuda or mps.
    """
    from .chat import chat as converse
    from .loading import load_model

    converse(*load_model(model, device), max_new_tokens, temperature, top_k)


COMMANDS: dict[str, Callable[..., None]] = {
    "data list": data_cli.list_sources,
    "data estimate": data_cli.estimate,
    "data prepare": data_cli.prepare,
    "data seal": data_cli.seal,
    "data verify": data_cli.verify,
    "data show": data_cli.show,
    "tokenizer train": tokenizer_cli.tokenizer_train,
    "eval": eval_cli.evaluate,
    "sample": sample,
    "chat": chat,
    "report": report,
}


def main(words: list[str] | None = None) -> None:
    """Run one command. Exit code 2 for a user's mistake."""
    words = sys.argv[1:] if words is None else words
    with clear_errors():
        if not words or words[0] in ("-h", "--help"):
            print(_usage())
            raise SystemExit(0 if words else 2)
        name = next((name for name in COMMANDS if words[: name.count(" ") + 1] == name.split()), None)
        if name is None:
            given = " ".join(words[:2] if words[0] in ("data", "tokenizer") else words[:1])
            raise UserError(f"unknown command {given!r}{nearest(given, list(COMMANDS))}\n{_usage()}")
        tyro.cli(COMMANDS[name], args=words[name.count(" ") + 1 :], prog=f"myllm {name}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: myllm COMMAND ... (--help after a command lists its options)\n\n" + "\n".join(lines)
