"""Files of `myllm sample`: read prompts, write samples as text or as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from myllm.errors import UserError
from myllm.files import parse_json
from myllm.paths import user_path

if TYPE_CHECKING:
    from .completion import Completion


def read_prompts(file: Path) -> list[str]:
    """One prompt per line or, in a .jsonl file, one object with "prompt" per line. Blank lines are skipped.

    Raises:
        UserError: the file is unreadable or has no prompts, or a line has another format.
    """
    try:
        # split, not splitlines: form feeds, U+0085 and U+2028 may be part of a prompt.
        lines = [line.removesuffix("\r") for line in user_path(file).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{file} has no prompts; expected one prompt per line")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_parse_prompt(line, f"line {number} of {file}") for number, line in numbered]


def _parse_prompt(line: str, position: str) -> str:
    value = parse_json(line, position)
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UserError(f'{position}: expected an object with a string "prompt", found {line[:80]}')
    return value["prompt"]


class OrderedPrinter:
    """Prints samples that are generated together one after the other: the first unfinished sample as it is generated,
    the text of later ones when it is their turn.

    Args:
        prompts: of all samples, in order.
    """

    def __init__(self, prompts: list[str], file: TextIO) -> None:
        self.prompts, self.file = prompts, file
        self.held = [""] * len(prompts)
        self.current = 0

    def add_text(self, number: int, text: str) -> None:
        """New text of sample `number`, counted from 0."""
        if number == self.current:
            print(text, end="", file=self.file, flush=True)
        else:
            self.held[number] += text

    def print_all(self, completions: "Iterator[Completion]") -> None:
        self._start_sample()
        for _ in completions:
            print(file=self.file, flush=True)
            self.current += 1
            if self.current < len(self.prompts):
                self._start_sample()

    def _start_sample(self) -> None:
        header = f"--- {self.current + 1}\n" if len(self.prompts) > 1 else ""
        text = f"{header}{self.prompts[self.current]}{self.held[self.current]}"
        print(text, end="", file=self.file, flush=True)


def write_records(
    file: TextIO, completions: "Iterator[Completion]", settings: dict[str, Any], one_per_line: bool
) -> None:
    """Write samples with their settings, as one JSON list or as one JSON object per line."""
    records = ({**asdict(completion), "settings": settings} for completion in completions)
    if not one_per_line:
        print(json.dumps(list(records), ensure_ascii=False, indent=2), file=file)
        return
    for record in records:
        print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
