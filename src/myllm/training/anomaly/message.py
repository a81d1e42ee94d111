"""Messages about skipped updates and diverged steps."""

import math
from pathlib import Path
from typing import Any

from myllm.config import TrainConfig
from myllm.formatting import format_names
from myllm.planning.batch import BatchPlan
from myllm.training.gradient_guard import SkippedStep

SHOWN_CHARS = 120
"""Of a sample's text."""
SHOWN_NAMES = 4


def skip_message(bad: SkippedStep, batch: BatchPlan) -> str:
    reason = {
        "nonfinite": "its gradient is not finite",
        "spike": f"its gradient norm {bad.grad_norm:.3g} is a spike",
        "overflow": "its gradient overflowed float16, so the loss scale is halved",
    }[bad.kind]
    position = _data_position(bad.data.epoch, bad.data.index, batch.sequences)
    return f"skipped the update of step {bad.step:,}: {reason} (data: {position})"


def failure_message(
    summary: dict[str, Any], samples: list[dict[str, Any]], train: TrainConfig, dump: Path, failure: Exception | None
) -> str:
    """What happened, where, and what to do.

    Args:
        samples: the rows of samples.jsonl.
        failure: why the dump could not be written.
    """
    step, data = summary["step"], summary["data"]
    too_many = summary["kind"] == "spike" or train.on_nonfinite == "skip"
    problem = f"the gradient of step {step:,} is not finite"
    if summary["kind"] == "spike":
        problem = f"the gradient norm of step {step:,} is a spike, {summary['grad_norm']:.3g}"
    lines = [f"{problem}: the update was skipped, and nothing was saved since"]
    if too_many:
        limit = train.max_skipped_steps
        lines.append(f"  skipped      {summary['consecutive']:,} in a row; train.max_skipped_steps is {limit:,}")
    position = _data_position(data["epoch"], data["index"], len(samples))
    lines.append(f"  data         {position} of {summary['dataset']}")
    lines += _findings(summary, samples)
    lines.append(f"  dump         {f'not written: {failure}' if failure else dump}")
    lines.append("what to do")
    if not failure:
        lines.append(f"  myllm replay {dump}   repeats this step on the CPU and shows its text")
    remedy = "raise --train.max-skipped-steps" if too_many else "skip such updates with --train.on-nonfinite skip"
    lines += [
        "  The same command resumes from the newest checkpoint. If the same step fails again, its data or the weights",
        f"  are the cause: lower --optim.max-lr, or {remedy}",
    ]
    return "\n".join(lines)


def _data_position(epoch: int, index: int, n_samples: int) -> str:
    return f"epoch {epoch}, samples {index:,} to {index + n_samples - 1:,} in shuffled order"


def _findings(summary: dict[str, Any], samples: list[dict[str, Any]]) -> list[str]:
    """Which sample, module and tensors."""
    lines = [
        f"  no diagnosis rank {rank} could not repeat the step: {error}"
        for rank, error in enumerate(summary["errors"])
        if error
    ]
    if summary["nonfinite_weights"]:
        lines.append(
            f"  weights      not finite before the step: {format_names(summary['nonfinite_weights'], SHOWN_NAMES)}"
        )
    lines += _sample_lines(summary["kind"], samples)
    for first in summary["first_nonfinite"][:SHOWN_NAMES]:
        input_state = "finite" if first["input_finite"] else "not finite either"
        lines.append(
            f"  first seen   in the output of {first['module']} on rank {first['rank']}; its input was {input_state}"
        )
    if summary["first_nonfinite_backward"] and not summary["first_nonfinite"]:
        module = summary["first_nonfinite_backward"]
        lines.append(f"  first seen   in the backward pass, in the gradient of the output of {module}")
    if summary["nonfinite_gradients"]:
        lines.append(f"  gradients    not finite: {format_names(summary['nonfinite_gradients'], SHOWN_NAMES)}")
    if summary["kind"] == "nonfinite" and summary["reproduced"] is False:
        lines.append(
            "  repeated     at once on the same device, the step is finite: suspect the device or the code that "
            "torch.compile generated before the data"
        )
    return lines


def _sample_lines(kind: str, samples: list[dict[str, Any]]) -> list[str]:
    if kind == "spike":  # every sample is finite, but one may have most of the gradient
        bad = sorted(samples, key=lambda row: row["gradient"] or 0.0, reverse=True)[:1]
    else:
        bad = [row for row in samples if not all(math.isfinite(row[key] or 0.0) for key in ("loss", "gradient"))]
    lines = []
    for row in bad[:SHOWN_NAMES]:
        values = "not known"
        if row["loss"] is not None:
            values = f"loss {row['loss']:.4g}, gradient {row['gradient']:.4g}"
        lines.append(
            f"  sample {row['sample']:<5} {values}: sequence {row['sequence']:,}, on rank {row['rank']}, "
            f"{row['text'][:SHOWN_CHARS]!r}"
        )
    if len(bad) > SHOWN_NAMES:
        lines.append(f"               and {len(bad) - SHOWN_NAMES:,} more of {len(samples):,} samples")
    return lines
