"""The file that `myllm eval` adds to. docs/eval_format.md describes its content."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from myllm.errors import UserError
from myllm.files import file_lock, json_safe, read_json, write_json
from myllm.formatting import format_table
from myllm.runs.history import centered_mean

FORMAT = "myllm-eval"
VERSION = 2


class Result(NamedTuple):
    """The metrics of one task, and everything that decides them."""

    task: str
    checkpoint: str
    step: int | None
    weights: str
    """`float32`, `bfloat16`, `float16` or `int8`."""
    settings: dict[str, Any]
    metrics: dict[str, Any]
    device: str
    seconds: float


def read(file: Path) -> list[Result]:
    """The results so far; empty if the file does not exist.

    Raises:
        UserError: the file is unreadable or has another format.
    """
    try:
        content = read_json(file)
        if content["format"] != FORMAT or content["version"] not in (1, VERSION):
            raise ValueError
        rows = content["results"]
        if content["version"] == 1:
            rows = [_upgrade(row) for row in rows]
        return [Result(**row) for row in rows]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give another file with --out") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} exists, but is not a result file of `myllm eval` that this version reads: move it away, or choose "
            "another file with --out"
        ) from None


def _upgrade(row: dict[str, Any]) -> dict[str, Any]:
    """A result of version 1 in today's names."""
    row = {("metrics" if key == "figures" else key): value for key, value in row.items()}
    return row | {"task": re.sub(r"^quantisation(?=:|$)", "quantization", row["task"])}


def add(file: Path, result: Result) -> None:
    """Add a result to the file. It replaces an older one of the same question.

    Raises:
        UserError: the file cannot be written, or has another format.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(file.with_name(f".{file.name}.lock")):  # other processes may add to the same file
            merged = read(file)
            # A question is all fields up to `settings`.
            same = next((index for index, old in enumerate(merged) if old[:5] == result[:5]), len(merged))
            merged[same : same + 1] = [result]
            rows = [row._asdict() for row in merged]
            write_json(file, {"format": FORMAT, "version": VERSION, "results": json_safe(rows)})
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; give another file with --out") from None


def summarize(results: list[Result]) -> Result | None:
    """The mean of the centered accuracies of the public tasks among these results; None for fewer than two."""
    by_name = {result.task.partition(":")[0]: result for result in results}
    mean = centered_mean({name: result.metrics for name, result in by_name.items()})
    if mean is None:
        return None
    of = [by_name[name] for name in mean.tasks]
    settings = {result.task: result.settings for result in of}
    metrics = {"centered_mean": mean.value, "centered_mean_stderr": mean.stderr, "n_tasks": len(of)}
    return of[-1]._replace(
        task="summary", settings=settings, metrics=metrics, seconds=sum(result.seconds for result in of)
    )


def table(result: Result) -> str:
    """One line for each metric and each setting."""
    settings = {"tasks": " ".join(result.settings)} if result.task == "summary" else result.settings
    values = result.metrics | settings | {"seconds": round(result.seconds, 2)}
    return format_table([(result.task, name, _format(value)) for name, value in values.items()], right={2})


def _format(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
