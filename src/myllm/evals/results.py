"""The file that `myllm eval` adds to. docs/eval_format.md says what is in it."""

from pathlib import Path
from typing import Any, NamedTuple

from myllm.errors import UserError
from myllm.files import locked, read_json, write_json
from myllm.nonfinite import json_safe

FORMAT = "myllm-eval"
VERSION = 1


class Result(NamedTuple):
    """One task's figures, and everything that decides them."""

    task: str
    checkpoint: str
    step: int | None
    weights: str
    """`float32` or `int8`."""
    settings: dict[str, Any]
    figures: dict[str, Any]
    device: str
    seconds: float

    def same_question(self, other: "Result") -> bool:
        """Whether the newer of both says all that the older did."""
        return self[:5] == other[:5]


def read(file: Path) -> list[Result]:
    """What was measured so far; nothing if there is no file.

    Raises:
        UserError: it is none of ours, which is never written over.
    """
    try:
        content = read_json(file)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError
        return [Result(**each) for each in content["results"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give another file with --out") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is there and holds no results of `myllm eval` that this version reads: move it away, or give "
            "another file with --out"
        ) from None


def add(file: Path, results: list[Result]) -> None:
    """Put results into the file: each in place of an older one of the same question, or behind all others.

    Raises:
        UserError: the file cannot be written, or is none of ours.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f".{file.name}.lock")):  # two may measure at once
            merged = read(file)
            for new in results:
                places = [index for index, old in enumerate(merged) if old.same_question(new)]
                if places:
                    merged[places[0]] = new
                else:
                    merged.append(new)
            rows = [each._asdict() for each in merged]
            write_json(file, {"format": FORMAT, "version": VERSION, "results": json_safe(rows)})
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; give another file with --out") from None


def table(results: list[Result]) -> str:
    """A line a setting and a figure, by task."""
    lines = [
        (each.task, name, _shown(value))
        for each in results
        for name, value in (each.figures | each.settings | {"seconds": round(each.seconds, 2)}).items()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
