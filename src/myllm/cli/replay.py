"""`myllm replay DUMP`: repeat a training step that diverged and show where."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import tyro

from myllm import paths
from myllm.errors import UserError

if TYPE_CHECKING:
    from myllm.training.anomaly.dump import AnomalyDump
    from myllm.training.anomaly.replay import Replay

Positional = tyro.conf.Positional
Device = Literal["auto", "cpu", "cuda", "mps"]
LISTED = 10
"""Samples in the table. samples.jsonl of the dump has all of them."""


def replay(
    dump: Positional[str],
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Device = "cpu",
    samples: tuple[int, ...] = (),
    show: int = 1,
) -> None:
    """Replay a bad training step saved in an anomaly dump.

    Args:
        dump: folder of the dump, or the name or folder of a run for its newest dump.
        precision: float32, or autocast to bfloat16 or float16 as on CUDA.
        device: cpu, cuda, mps or auto. Dropout repeats only on the kind of device of the run.
        samples: replay only these indices in the step; a whole step can take hours on a CPU.
        show: number of samples to print the text of, worst first.
    """
    if show < 0:
        raise UserError(f"--show is {show}, but must be at least 0")
    if not paths.may_be_model(dump, hub=False):  # before the seconds that importing torch takes
        raise UserError(f"no anomaly dump at {dump!r}: there is no such folder and no such run")
    import torch

    from myllm.distributed.collectives import choose_device
    from myllm.training.anomaly.dump import find_dump, read_dump
    from myllm.training.anomaly.replay import replay_step

    chosen = choose_device(device)
    content = read_dump(find_dump(dump, paths.runs_dir()))
    result = replay_step(content, chosen, getattr(torch, precision), samples)
    print("\n".join(_report(content, result, chosen.type, precision, show)))


def _report(dump: "AnomalyDump", result: "Replay", device: str, precision: str, show: int) -> Iterator[str]:
    summary, diagnosis = dump.summary, result.diagnosis
    yield f"{dump.folder}"
    yield (
        f"step {summary['step']:,}: run on {summary['world_size']} x {summary['device_name']} in "
        f"{summary['precision']}, replayed on {device} in {precision}"
    )
    if len(result.samples) < len(dump.samples):
        yield f"only {len(result.samples):,} of {len(dump.samples):,} samples: loss and gradient are theirs alone"
    elif summary["device"] != device and _has_dropout(dump):
        yield f"dropout of {summary['device']} cannot be repeated on {device}: expect similar numbers, not the same"
    yield ""
    yield f"{'':<16}{'run':>12}{'replay':>12}"
    yield f"{'loss':<16}{_number(summary['loss'])}{_number(diagnosis.loss)}"
    yield f"{'gradient norm':<16}{_number(summary['grad_norm'])}{_number(diagnosis.grad_norm)}"
    yield ""
    yield from _verdict(result)
    yield ""
    yield from _layers(result)
    yield ""
    yield from _samples(dump, result, show)


def _has_dropout(dump: "AnomalyDump") -> bool:
    return any(value for name, value in vars(dump.config.model).items() if name.startswith("dropout"))


def _verdict(result: "Replay") -> Iterator[str]:
    found = result.diagnosis
    if math.isfinite(found.loss) and math.isfinite(found.grad_norm):
        yield "finite in the replay"
        return
    yield "not finite in the replay either"
    if found.nonfinite_weights:
        yield f"weights that were not finite before the step: {', '.join(found.nonfinite_weights)}"
    if first := found.first_nonfinite:
        input_state = "finite" if first.input_finite else "not finite either"
        yield f"first seen in the output of {first.module}; its input was {input_state}"
    else:
        yield "the output of every module was finite"
    if found.first_nonfinite_backward:
        yield f"backward pass: first seen in the gradient of the output of {found.first_nonfinite_backward}"
    if found.nonfinite_gradients:
        yield f"gradients that are not finite: {', '.join(found.nonfinite_gradients)}"


def _layers(result: "Replay") -> Iterator[str]:
    """A table in the order of computation, with each module's own weights only, so that nothing counts twice."""
    layers = result.diagnosis.layers
    width = max(len(layer.module) for layer in layers) + 2
    titles = ("weight", "gradient", "update", "output rms", "largest")
    yield f"{'norm by module':<{width}}" + "".join(f"{title:>12}" for title in titles)
    for layer in layers:
        if layer.module.endswith("dropout") and layer.output_finite:
            continue
        values = (
            layer.weight_norm,
            layer.gradient_norm,
            result.updates.get(layer.module) if layer.weight_norm is not None else None,
            layer.activation_rms,
            layer.activation_max,
        )
        mark = "" if layer.output_finite else "   not finite"
        yield f"{layer.module:<{width}}" + "".join(map(_number, values)) + mark


def _samples(dump: "AnomalyDump", result: "Replay", show: int) -> Iterator[str]:
    """The worst samples: those that are not finite first, then by the gradient at their inputs."""
    losses = dict(zip(result.samples, result.diagnosis.losses, strict=True))
    gradients = dict(zip(result.samples, result.diagnosis.input_gradient_norms, strict=True))

    def badness(sample: int) -> tuple[bool, float]:
        finite = math.isfinite(losses[sample]) and math.isfinite(gradients[sample])
        return not finite, gradients[sample] if finite else -sample

    worst = sorted(losses, key=badness, reverse=True)
    yield f"{'sample':<8}{'sequence':>10}{'rank':>6}{'loss: run':>12}{'replay':>12}{'gradient: run':>15}{'replay':>12}"
    for sample in worst[:LISTED]:
        row = dump.samples[sample]
        values = f"{_number(row['loss'])}{_number(losses[sample])}   {_number(row['gradient'])}"
        yield f"{sample:<8}{row['sequence']:>10,}{row['rank']:>6}{values}{_number(gradients[sample])}"
    if len(worst) > LISTED:
        yield f"and {len(worst) - LISTED:,} more"
    yield "(gradient: norm at the sample's embedded tokens)"
    for sample in worst[:show]:
        yield f"\n--- sample {sample}, sequence {dump.samples[sample]['sequence']:,}\n{dump.samples[sample]['text']}"


def _number(value: float | str | None) -> str:
    """Five digits in twelve characters; blank if unknown."""
    return f"{'' if value is None else f'{float(value):.5g}':>12}"
