"""`myllm replay BAG`: a step whose numbers went bad, made again and taken apart."""

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
"""Samples in the table; all are in the bag's samples.jsonl."""


def replay(
    bag: Positional[str],
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Device = "cpu",
    samples: tuple[int, ...] = (),
    show: int = 1,
) -> None:
    """Replay a bad training step saved in a crash dump.

    Args:
        bag: its folder, or a run's name or folder for the newest one of that run.
        precision: float32, or autocast to bfloat16 or float16 as on CUDA.
        device: cpu, cuda, mps or auto. Dropout falls as it did in the run on the same kind of device only.
        samples: only these, by their place in the step; a whole step may take a CPU hours.
        show: how many samples to show the text of, the worst first.
    """
    if show < 0:
        raise UserError(f"show is {show}, but must be at least 0")
    if not paths.leads_somewhere(bag, hub=False):  # before the seconds that torch takes
        raise UserError(f"no flight bag at {bag!r}: there is neither such a folder nor such a run")
    import torch

    from myllm.distributed.collectives import choose_device
    from myllm.training.anomaly.dump import find_dump, read_dump
    from myllm.training.anomaly.replay import replay_step

    chosen = choose_device(device)
    content = read_dump(find_dump(bag, paths.runs()))
    result = replay_step(content, chosen, getattr(torch, precision), samples)
    print("\n".join(_report(content, result, chosen.type, precision, show)))


def _report(bag: "AnomalyDump", result: "Replay", device: str, precision: str, show: int) -> Iterator[str]:
    about, found = bag.about, result.diagnosis
    yield f"{bag.folder}"
    yield (
        f"step {about['step']:,}: made on {about['world_size']} x {about['device_name']} in {about['precision']}, "
        f"here on {device} in {precision}"
    )
    if len(result.places) < len(bag.samples):
        yield f"only {len(result.places):,} of its {len(bag.samples):,} samples: loss and gradient are of these alone"
    elif about["device"] != device and any(value for key, value in bag.config["model"].items() if "dropout" in key):
        yield f"its dropout fell on {about['device']}, which {device} cannot repeat: other figures, about as large"
    yield ""
    yield f"{'':<16}{'then':>12}{'here':>12}"
    yield f"{'loss':<16}{_number(about['loss'])}{_number(found.loss)}"
    yield f"{'gradient norm':<16}{_number(about['grad_norm'])}{_number(found.grad_norm)}"
    yield ""
    yield from _verdict(result)
    yield ""
    yield from _layers(result)
    yield ""
    yield from _samples(bag, result, show)


def _verdict(result: "Replay") -> Iterator[str]:
    found = result.diagnosis
    if math.isfinite(found.loss) and math.isfinite(found.grad_norm):
        yield "finite here"
        return
    yield "not finite here either"
    if found.bad_weights:
        yield f"weights that were not finite before the step: {', '.join(found.bad_weights)}"
    if first := found.first_bad:
        given = "finite" if first.input_finite else "not finite either"
        yield f"first seen in the output of {first.module}; what it was given was {given}"
    else:
        yield "every module's output was finite"
    if found.first_bad_backward:
        yield f"going backward, first seen in the gradient of the output of {found.first_bad_backward}"
    if found.bad_gradients:
        yield f"gradients that are not finite: {', '.join(found.bad_gradients)}"


def _layers(result: "Replay") -> Iterator[str]:
    """A table in the order of computation. A module's own weights only, so that nothing is counted twice."""
    layers = result.diagnosis.layers
    width = max(len(layer.module) for layer in layers) + 2
    titles = ("weight", "gradient", "update", "output rms", "largest")
    yield f"{'norm by module':<{width}}" + "".join(f"{title:>12}" for title in titles)
    for layer in layers:
        if layer.module.endswith("dropout") and layer.output_finite:
            continue
        figures = (
            layer.weight_norm,
            layer.gradient_norm,
            result.updates.get(layer.module) if layer.weight_norm is not None else None,
            layer.activation_rms,
            layer.activation_max,
        )
        yield f"{layer.module:<{width}}" + "".join(map(_number, figures)) + ("" if layer.output_finite else "   bad")


def _samples(bag: "AnomalyDump", result: "Replay", show: int) -> Iterator[str]:
    """The worst samples: not finite first, then by the gradient that reaches them."""
    found = result.diagnosis
    figures = dict(zip(result.places, zip(found.losses, found.input_gradients, strict=True), strict=True))

    def badness(place: int) -> tuple[bool, float]:
        finite = all(map(math.isfinite, figures[place]))
        return not finite, figures[place][1] if finite else -place

    worst = sorted(figures, key=badness, reverse=True)
    yield f"{'sample':<8}{'sequence':>10}{'rank':>6}{'loss then':>12}{'here':>12}{'gradient then':>15}{'here':>12}"
    for place in worst[:LISTED]:
        row, (loss, gradient) = bag.samples[place], figures[place]
        then, here = _number(row["loss"]) + _number(loss), f"{_number(row['gradient']):>15}{_number(gradient)}"
        yield f"{place:<8}{row['sequence']:>10,}{row['rank']:>6}{then}{here}"
    if len(worst) > LISTED:
        yield f"and {len(worst) - LISTED:,} more"
    yield "(gradient: norm of what reaches the sample's embedded tokens)"
    for place in worst[:show]:
        yield f"\n--- sample {place}, sequence {bag.samples[place]['sequence']:,}\n{bag.samples[place]['text']}"


def _number(value: float | str | None) -> str:
    """Twelve characters: a figure of five digits, a blank for what is not known."""
    return f"{'' if value is None else f'{float(value):.5g}':>12}"
