"""`myllm sample`, `myllm chat` and `myllm serve`: text from a trained model."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import tyro

from myllm import paths
from myllm.errors import UserError
from myllm.files import parse_json
from myllm.inference.sampling_params import SamplingParams
from myllm.paths import check_writable, user_path

if TYPE_CHECKING:
    from myllm.inference.completion import Completion
    from myllm.inference.language_model import LanguageModel

Positional = tyro.conf.Positional
MOST_SAMPLES = 1_000_000
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Settings = Annotated[SamplingParams, tyro.conf.arg(name="")]  # no prefix: --top-p 0.9


def sample(
    model: Positional[str],
    sampling: Settings,
    prompt: str | None = None,
    prompts_file: Path | None = None,
    num_samples: int = 3,
    max_new_tokens: int = 100,
    stop: tuple[str, ...] = (),
    batch_size: int = 16,
    format: Literal["text", "json", "jsonl"] = "text",
    out: Path | None = None,
    device: Device = "auto",
    int8: bool = False,
    precision: Precision | None = None,
) -> None:
    """Generate text from one prompt or a file of prompts.

    Args:
        model: a run's name or folder (its newest checkpoint), a checkpoint's folder, an exported folder or another of
            transformers, or a model of the Hub: NAMESPACE/NAME, NAMESPACE/NAME@REVISION.
        prompt: text to continue; empty or not given: begin a new document.
        prompts_file: a prompt a line; in a file that ends in .jsonl, an object with "prompt" a line.
        num_samples: how many continuations of each prompt.
        max_new_tokens: of each; the end of the document ends it too.
        stop: end a sample before the first of these strings.
        batch_size: samples that are made together; never changes the text, up to rounding.
        format: text for people, as it comes: of samples made together, one after the other; json, one list; jsonl, an
            object a line, written as samples are done, in order.
        out: write to this file instead of the terminal.
        device: auto, cpu, cuda or mps.
        int8: weights in eight bits, by torchao: a quarter of the memory.
        precision: of matrix products; None: the training's own, as it is on this device.
    """
    sampling.check()  # before the seconds that torch and loading take
    if num_samples > MOST_SAMPLES:
        raise UserError(f"num_samples is {num_samples:,}, but must be at most {MOST_SAMPLES:,} a call")
    paths.check_model_path(model)
    prompts = _prompts(prompt, prompts_file)
    out = out and user_path(out)
    _check_out(out)
    from myllm.inference.completion import complete
    from myllm.inference.load import load_model

    loaded = load_model(model, device, int8, precision)
    _note(loaded, prompts, sampling.temperature == 0 and num_samples > 1)
    settings = {**asdict(sampling), "max_new_tokens": max_new_tokens, "stop": list(stop), "model": model}
    del settings["seed"]  # each record has its own
    turns = Turns([each for each in prompts for _ in range(num_samples)]) if format == "text" else None
    made = complete(
        loaded, prompts, max_new_tokens, sampling, stop=stop, num_samples=num_samples, batch_size=batch_size,
        on_text=turns.show if turns else None,
    )  # fmt: skip
    escaping = {"encoding": "utf-8", "errors": "backslashreplace"}
    with out.open("w", **escaping) if out else nullcontext(sys.stdout) as file:
        if turns:
            turns.write(file, made)
        else:
            _write_records(file, (_record(each, settings) for each in made), format)


class Turns:
    """Samples that are made together, one after the other: the first unfinished one as it comes, the rest held back.

    Args:
        prompts: of every sample, in order.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts, self.held = prompts, [""] * len(prompts)
        self.turn = 0
        self.file: TextIO = sys.stdout

    def show(self, number: int, text: str) -> None:
        """New text of a sample, which counts from 0."""
        if number == self.turn:
            print(text, end="", file=self.file, flush=True)
        else:
            self.held[number] += text

    def write(self, file: TextIO, made: "Iterator[Completion]") -> None:
        """Write all samples; each that is done hands the turn on."""
        self.file = file
        self._begin()
        for _ in made:
            print(file=file, flush=True)
            self.turn += 1
            if self.turn < len(self.prompts):
                self._begin()

    def _begin(self) -> None:
        header = f"--- {self.turn + 1}\n" if len(self.prompts) > 1 else ""
        text = f"{header}{self.prompts[self.turn]}{self.held[self.turn]}"
        print(text, end="", file=self.file, flush=True)


def chat(
    model: Positional[str],
    sampling: Settings,
    max_new_tokens: int = 100,
    device: Device = "auto",
    int8: bool = False,
    precision: Precision | None = None,
) -> None:
    """Generate text interactively in the terminal.

    Args:
        model: a run's name or folder (its newest checkpoint), a checkpoint's folder, an exported folder or another of
            transformers, or a model of the Hub: NAMESPACE/NAME, NAMESPACE/NAME@REVISION.
        max_new_tokens: of each reply.
        device: auto, cpu, cuda or mps.
        int8: weights in eight bits, by torchao: a quarter of the memory.
        precision: of matrix products; None: the training's own, as it is on this device.
    """
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, but must be at least 0")
    sampling.check()
    paths.check_model_path(model)
    from myllm.inference.chat import chat as converse
    from myllm.inference.load import load_model

    converse(load_model(model, device, int8, precision), max_new_tokens, sampling)


def serve(
    model: Positional[str],
    sampling: Settings,
    max_new_tokens: int = 100,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: Device = "auto",
    int8: bool = False,
    precision: Precision | None = None,
) -> None:
    """Generate text in the browser, with per-token probabilities.

    The settings are where the page's sliders stand at first.

    Args:
        model: a run's name or folder (its newest checkpoint), a checkpoint's folder, an exported folder or another of
            transformers, or a model of the Hub: NAMESPACE/NAME, NAMESPACE/NAME@REVISION.
        max_new_tokens: of a text.
        host: address to listen on; with any but this machine's own, everybody who reaches it can use the model.
        port: to listen on; 0: any that is free.
        device: auto, cpu, cuda or mps.
        int8: weights in eight bits, by torchao: a quarter of the memory.
        precision: of matrix products; None: the training's own, as it is on this device.
    """
    from myllm.inference.server.request import GenerateRequest, check_request

    default = GenerateRequest("", max_new_tokens, sampling)
    check_request(default)  # before the seconds that loading takes
    paths.check_model_path(model)
    from myllm.inference.server.http import serve

    serve(model, device, int8, host, port, default, precision)


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: its folder is not there; make it first")
    check_writable(out, "--out")


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if file is None:
        return [prompt or ""]
    if prompt is not None:
        raise UserError("give --prompt or --prompts-file, not both")
    try:
        # Not splitlines: form feeds, U+0085 and U+2028 may stand in a prompt.
        lines = [line.removesuffix("\r") for line in user_path(file).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{file} holds no prompt: write one a line")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"line {number} of {file}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    value = parse_json(line, where)
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UserError(f'{where} is no object with a text under "prompt": {line[:80]}')
    return value["prompt"]


def _note(model: "LanguageModel", prompts: Sequence[str], all_alike: bool) -> None:
    """What a user may not expect, on the error stream, so that it never mixes with the text."""

    context = model.model.config.max_seq_len
    if "" in prompts:
        print("note: the prompt is empty: the model begins a new document", file=sys.stderr)
    for number, prompt in enumerate(prompts, 1):
        if (length := len(model.tokenizer.encode_document(prompt).tolist())) > context:
            print(
                f"note: prompt {number} has {length:,} tokens, the context {context:,}: only its last {context:,} "
                "are read",
                file=sys.stderr,
            )
    if all_alike:
        print("note: temperature 0 draws nothing: all samples of a prompt are the same", file=sys.stderr)


def _write_records(file: TextIO, records: Iterator[dict[str, Any]], form: str) -> None:
    if form == "json":
        print(json.dumps(list(records), ensure_ascii=False, indent=2), file=file)
        return
    for record in records:
        print(json.dumps(record, ensure_ascii=False), file=file, flush=True)


def _record(each: "Completion", settings: dict[str, Any]) -> dict[str, Any]:
    return {**asdict(each), "settings": settings}
