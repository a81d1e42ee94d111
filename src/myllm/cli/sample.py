"""`myllm sample`, `myllm chat` and `myllm serve`: generate text with a trained model."""

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from myllm import paths
from myllm.errors import UserError
from myllm.inference.samples import OrderedPrinter, read_prompts, write_records
from myllm.inference.sampling_params import SamplingParams
from myllm.paths import check_writable, user_path

if TYPE_CHECKING:
    from myllm.inference.generate import LanguageModel


@dataclass(frozen=True, kw_only=True)
class LoadArgs:
    """How to load a model."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is cuda, mps or cpu: the first that is available."""
    int8: bool = False
    """Use int8 weights, a quarter of the memory. Needs torchao."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of matrix products. None: as in training, if the device supports it."""

    def load_model(self, model: str) -> "LanguageModel":
        from myllm.inference.load import load_model

        return load_model(model, self.device, self.int8, self.precision)


@dataclass(frozen=True, kw_only=True)
class ModelArgs(LoadArgs):
    """The model, and how to load it."""

    model: tyro.conf.Positional[str]
    """A run's name or folder (its newest intact checkpoint), a checkpoint's folder, a transformers folder such as an
    export, or a model on the Hub: NAMESPACE/NAME, NAMESPACE/NAME@REVISION."""


Loading = Annotated[LoadArgs, tyro.conf.arg(name="")]
Source = Annotated[ModelArgs, tyro.conf.arg(name="")]  # no prefix: --device cpu
Sampling = Annotated[SamplingParams, tyro.conf.arg(name="")]


def sample(
    source: Source,
    sampling: Sampling,
    prompt: str | None = None,
    prompts_file: Path | None = None,
    num_samples: int = 3,
    max_new_tokens: int = 100,
    stop: tuple[str, ...] = (),
    batch_size: int = 16,
    format: Literal["text", "json", "jsonl"] = "text",
    out: Path | None = None,
) -> None:
    """Generate text from one prompt or a file of prompts.

    Args:
        prompt: text to continue. Empty or not given: start a new document.
        prompts_file: file with one prompt per line or, if it ends in .jsonl, one object with "prompt" per line.
        num_samples: continuations of each prompt.
        max_new_tokens: maximum length of each sample. The end of the document ends it, too.
        stop: end a sample before the first of these strings.
        batch_size: samples generated together. Does not change the text, up to rounding.
        format: text, printed as it is generated; json, one list; jsonl, one object per line, as samples are finished.
        out: write to this file instead of stdout.
    """
    sampling.check()  # importing torch and loading the model take seconds
    paths.check_model_path(source.model)
    if prompts_file and prompt is not None:
        raise UserError("give --prompt or --prompts-file, not both")
    prompts = read_prompts(prompts_file) if prompts_file else [prompt or ""]
    out = out and user_path(out)
    if out:
        if not out.absolute().parent.is_dir():
            raise UserError(f"cannot write {out}: its folder does not exist; create it first")
        check_writable(out, "--out")
    from myllm.inference.completion import complete

    model = source.load_model(source.model)
    _print_notes(model, prompts, sampling.temperature == 0 and num_samples > 1)
    settings = {**asdict(sampling), "max_new_tokens": max_new_tokens, "stop": list(stop), "model": source.model}
    del settings["seed"]  # each record has its own
    with out.open("w", encoding="utf-8", errors="backslashreplace") if out else nullcontext(sys.stdout) as file:
        printer = OrderedPrinter([text for text in prompts for _ in range(num_samples)], file)
        completions = complete(
            model, prompts, max_new_tokens, sampling, stop=stop, num_samples=num_samples, batch_size=batch_size,
            on_text=printer.add_text if format == "text" else lambda number, text: None,
        )  # fmt: skip
        if format == "text":
            printer.print_all(completions)
        else:
            write_records(file, completions, settings, one_per_line=format == "jsonl")


def _print_notes(model: "LanguageModel", prompts: list[str], identical_samples: bool) -> None:
    """Print what a user may not expect to stderr, so that it does not mix with the text."""
    context = model.model.config.max_seq_len
    if "" in prompts:
        print("note: the prompt is empty: the model starts a new document", file=sys.stderr)
    for number, prompt in enumerate(prompts, 1):
        if (length := len(model.tokenizer.encode_document(prompt))) > context:
            print(
                f"note: prompt {number} has {length:,} tokens, the context {context:,}: only its last {context:,} "
                "are read",
                file=sys.stderr,
            )
    if identical_samples:
        print("note: temperature 0 is greedy: all samples of a prompt are the same", file=sys.stderr)


def chat(source: Source, sampling: Sampling, max_new_tokens: int = 100) -> None:
    """Generate text interactively in the terminal.

    Args:
        max_new_tokens: maximum length of each reply.
    """
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, but must be at least 0")
    sampling.check()
    paths.check_model_path(source.model)
    from myllm.inference import chat

    chat.chat(source.load_model(source.model), max_new_tokens, sampling)


def serve(
    models: tyro.conf.Positional[tuple[str, ...]],
    loading: Loading,
    sampling: Sampling,
    max_new_tokens: int = 100,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Generate text in the browser, with per-token probabilities, and for clients of OpenAI's API, at /v1.

    The page starts with these sampling parameters, and requests to the API have them as defaults.

    Args:
        models: a run's name or folder, a checkpoint's folder, a transformers folder or a model on the Hub. Of two
            models, the page shows the texts side by side.
        max_new_tokens: maximum length of a text.
        host: address to listen on. Everyone who can reach it can use the model; the default is this machine only.
        port: port to listen on. 0: any free port.
    """
    from myllm.inference.server.request import GenerateRequest, check_request

    if len(models) not in (1, 2) or len(set(models)) < len(models):
        raise UserError(f"got {' '.join(models) or 'no model'}, expected MODEL, or two different ones to compare")
    default = GenerateRequest("", max_new_tokens, sampling)
    check_request(default)
    for model in models:
        paths.check_model_path(model)
    from myllm.inference.server.http import serve

    serve({model: partial(loading.load_model, model) for model in models}, host, port, default)
