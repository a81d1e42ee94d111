"""Files of a run with made-up numbers, as training writes them."""

import json
import math
from pathlib import Path
from typing import Any

from myllm.paths import RunPaths


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "train", "step": step, "tokens": step * 1_000, "loss": 3 + 6 / (1 + step / 10), "lr": 1e-3,
        "grad_norm": 0.7, "step_s": 0.5, "tokens_per_s": 2_000.0, "mfu": None, "data_wait_s": 0.01,
    }  # fmt: skip
    return row | changes


def eval_row(name: str, step: int, **values: float) -> dict[str, Any]:
    return {"kind": "eval", "name": name, "step": step, "seconds": 1.0} | values


def validation_row(step: int, loss: float) -> dict[str, Any]:
    return eval_row(
        "validation",
        step,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss / 2,
        token_accuracy=min(1, step / 500),
    )


def write_run(folder: Path, rows: list[dict[str, Any]], samples: list[dict[str, Any]] = ()) -> RunPaths:
    run = RunPaths(folder)
    folder.mkdir(parents=True)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.samples.write_text("".join(json.dumps(row) + "\n" for row in samples))
    run.config.write_text(
        json.dumps({"name": folder.name, "optim": {"max_grad_norm": 1.0}, "train": {"max_steps": 400}})
    )
    run.environment.write_text(
        json.dumps({"parameters": 7_340_032, "command": "python pretrain.py debug --train.fresh", "versions": {"a": 1}})
    )
    return run


def full_rows() -> list[dict[str, Any]]:
    rows = [validation_row(0, 10.5)]
    rows += [train_row(step) for step in range(5, 201, 5)]
    rows += [validation_row(100, 4.0), validation_row(200, 3.25)]
    rows += [eval_row("cloze", step, acc=0.3, acc_norm=0.31, acc_stderr=0.02, n_examples=500) for step in (0, 200)]
    rows += [eval_row("hellaswag", step, acc=0.26, acc_norm=0.27, n_examples=100) for step in (0, 200)]
    return rows
