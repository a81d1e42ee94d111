"""`myllm COMMAND`: everything but training itself. Each command is a function whose arguments are its options."""

import sys
from collections.abc import Callable

import tyro

from .errors import UserError, nearest
from .launch import clear_errors

Positional = tyro.conf.Positional


def data_prepare(
    source: Positional[str],
    val_tokens: int = 1_000_000,
    target_tokens: int | None = None,
    shard_tokens: int = 100_000_000,
    shuffle_seed: int = 0,
    workers: int = 0,
) -> None:
    """Tokenise a source into shards and a manifest under temp_data/datasets.

    Args:
        source: python-stdlib, or files:PATH for a file, folder or glob of one's own.
        val_tokens: held out for validation: whole documents, at most about a tenth of the source.
        target_tokens: stop after about this many training tokens; None: all there are.
        shard_tokens: tokens a shard file.
        shuffle_seed: of the order in which the source's files are taken.
        workers: processes that tokenise; 0: one a core. Never changes the bytes.
    """
    from .config import DataConfig, RunConfig
    from .data.prepare import prepare
    from .validate import check_data_config

    config = DataConfig(
        source=source, val_tokens=val_tokens, target_tokens=target_tokens, shard_tokens=shard_tokens,
        shuffle_seed=shuffle_seed, workers=workers,
    )  # fmt: skip
    check_data_config(RunConfig(data=config))
    dataset = prepare(config)
    counts = dataset.manifest["counts"]
    print(f"{dataset.folder}")
    print(f"  train  {counts['train_tokens']:>15,} tokens  {counts['train_documents']:>11,} documents")
    print(f"  val    {counts['val_tokens']:>15,} tokens  {counts['val_documents']:>11,} documents")
    print(f"train on it with: python pretrain.py PRESET --data.dataset {dataset.name}")


def data_verify(name: Positional[str]) -> None:
    """Hash every shard of a data set again and compare with its manifest.

    Args:
        name: under temp_data/datasets, or a folder.
    """
    from .data.shards import find_dataset

    dataset = find_dataset(name)
    if damaged := dataset.damaged():
        raise UserError(f"{dataset.folder} is damaged: {', '.join(damaged)}; delete the folder and prepare it again")
    print(f"{dataset.folder}: {len(dataset.shards)} shards, all as the manifest says")


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
    "data prepare": data_prepare,
    "data verify": data_verify,
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
            given = " ".join(words[:2] if words[0] == "data" else words[:1])
            raise UserError(f"unknown command {given!r}{nearest(given, list(COMMANDS))}\n{_usage()}")
        tyro.cli(COMMANDS[name], args=words[name.count(" ") + 1 :], prog=f"myllm {name}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: myllm COMMAND ... (--help after a command lists its options)\n\n" + "\n".join(lines)
