"""Compare a run with a published one: validation loss and HellaSwag by training tokens, with early warnings.

reference.json has the published points; `Curve.at` interpolates linearly over the logarithm of tokens. The bands are:

- validation: 0.05 nats. Interpolation misses a point that is left out by 0.01 to 0.03, and the held-out documents and
  seeds differ. At the end of the curve, 0.05 nats correspond to a quarter more tokens.
- HellaSwag: two standard errors of the difference between two accuracies, 1.35 points on all 10,042 examples; more
  if a run uses fewer.

A run with another schedule, such as linear to zero, is worse than the published one until its own rate has decayed. It
is compared at its end only.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from myllm.config import to_dict
from myllm.data.sources.catalog import actual_source
from myllm.presets import get_preset

from .history import Row, section

SLACK = 0.01
"""A run is also compared with the first or last point if it is this fraction of the tokens away from it."""
TRAINING_CHOICES = {
    "vocab_multiple", "init", "dropout_embedding", "dropout_attention_residual", "dropout_ffn", "residual_dtype",
}  # fmt: skip
"""Model settings that may differ: they change how the model learns, not what it is."""
SCHEDULE = ("optim.schedule", "optim.min_lr_ratio")
"""Settings that decide when the learning rate decays, beside the length, which is equal."""
TITLES = {"validation": "validation loss", "hellaswag": "HellaSwag accuracy"}


@dataclass(frozen=True)
class Curve:
    """The published results of one evaluation."""

    key: str
    """Key in the evaluation's row of metrics."""
    lower_is_better: bool
    band: float
    """Differences up to this are not reported."""
    tokens: tuple[int, ...]
    """Ascending."""
    values: tuple[float, ...]

    def at(self, tokens: float) -> float | None:
        """The interpolated value after some number of tokens. None outside the published range."""
        first, last = self.tokens[0], self.tokens[-1]
        if not first * (1 - SLACK) <= tokens <= last * (1 + SLACK):
            return None
        return float(np.interp(math.log(tokens), np.log(self.tokens), self.values))  # constant outside

    def band_of(self, figures: Row) -> float:
        """The band of one measurement: wider if its standard error is larger than the published one."""
        error = figures.get(f"{self.key}_stderr")
        if not error:
            return self.band
        published = self.band / math.sqrt(8)  # the band is 2 standard errors of a difference: 2 sqrt(2) of one
        return 2 * math.hypot(published, max(error, published))


@dataclass(frozen=True)
class Reference:
    """A published run that a run is compared with."""

    name: str
    curves: dict[str, Curve]
    """By the evaluation's name."""
    batch_tokens: int
    """Tokens per step of the compared run, not of the published one."""
    differences: tuple[str, ...] = ()
    """Training settings that differ, as "optim.max_lr 0.001 (reference: 0.0021)"."""

    @property
    def compares_end_only(self) -> bool:
        """True if the schedule differs."""
        return any(difference.startswith(SCHEDULE) for difference in self.differences)


def find_reference(config: Row) -> Reference | None:
    """The published run to compare a config (as JSON values) with, or None.

    Model, data and number of tokens must be equal: context, tokenizer and source decide what a loss means, and the
    length decides when the learning rate decays. Learning rate, batch size and dropout may differ, and can be compared;
    with another schedule, at the end.
    """
    published = json.loads(files(__package__).joinpath("reference.json").read_text(encoding="utf-8"))
    original = to_dict(get_preset(published["preset"]))
    model, data, train = (section(config, part) for part in ("model", "data", "train"))
    shape = original["model"].keys() - TRAINING_CHOICES
    same_model = bool(model) and all(model.get(key, original["model"][key]) == original["model"][key] for key in shape)
    tokenizer, dataset = original["data"]["tokenizer"], data.get("dataset")
    source = actual_source(str(data.get("source")), None if dataset is None else str(dataset))
    same_data = source == original["data"]["source"] and data.get("tokenizer", tokenizer) == tokenizer
    length = _planned_tokens(original["train"])
    if not (same_model and same_data and abs(_planned_tokens(train) - length) <= SLACK * length):
        return None
    curves = {name: _curve(values) for name, values in published["curves"].items()}
    return Reference(published["name"], curves, train["batch_tokens"], tuple(_differences(config, original)))


def _planned_tokens(train: Row) -> float:
    steps, batch_tokens = train.get("max_steps"), train.get("batch_tokens")
    return steps * batch_tokens if isinstance(steps, int) and isinstance(batch_tokens, int) else 0


def _curve(values: Row) -> Curve:
    points = values["points"]
    return Curve(
        key=values["key"],
        lower_is_better=values["better"] == "lower",
        band=values["band"],
        tokens=tuple(point["tokens"] for point in points),
        values=tuple(point["value"] for point in points),
    )


def _differences(config: Row, original: Row) -> Iterable[str]:
    compared = [("model", key) for key in sorted(TRAINING_CHOICES - {"vocab_multiple"})]
    compared += [("optim", key) for key in original["optim"]] + [("train", "batch_tokens")]
    for part, key in compared:
        expected = original[part][key]
        if (value := section(config, part).get(key, expected)) != expected:
            yield f"{part}.{key} {value} (reference: {expected})"


class ReferenceWatch:
    """Compares each evaluation with the published curve, and reports when a run leaves or enters the band.

    A run that stays worse is only reported again when it is worse by another band. One that is better is reported once.
    One with another schedule is reported at its end only, whatever the result.
    """

    def __init__(self, reference: Reference | None, earlier: Iterable[Row] = ()) -> None:
        """
        Args:
            earlier: the rows of the run so far, so that a restart does not repeat reports.
        """
        self._reference = reference
        self._reported: dict[str, tuple[str, float]] = {}
        for row in earlier if reference else ():
            if row.get("kind") == "eval":
                self.compare(str(row.get("name")), row["step"], row)

    def compare(self, name: str, step: int, figures: Row) -> tuple[Row, str | None]:
        """Compare one evaluation with the curve.

        Returns:
            keys to add to its row, if there is a published value; and a line for the log, or None.
        """
        reference = self._reference
        curve = reference.curves.get(name) if reference else None
        if reference is None or curve is None or curve.key not in figures:
            return {}, None
        tokens = step * reference.batch_tokens
        expected = curve.at(tokens)
        at_end = reference.compares_end_only and tokens >= curve.tokens[-1] * (1 - SLACK)
        if expected is None or (reference.compares_end_only and not at_end):
            return {}, None
        value, band = figures[curve.key], curve.band_of(figures)
        gap = value - expected if curve.lower_is_better else expected - value
        gap = gap if math.isfinite(gap) else math.inf
        status = "worse" if gap > band else "better" if gap < -band else "inside"
        before, reported_gap = self._reported.get(name, ("inside", 0.0))
        added = {"reference": expected, "reference_band": band, "reference_status": status}
        if not at_end and status == before and not (status == "worse" and gap > reported_gap + band):
            return added, None
        self._reported[name] = (status, gap)
        line = (
            f"{TITLES.get(name, name)} {value:.4f} at step {step:,} ({tokens / 1e9:.3g}B tokens); the reference run "
            f"{reference.name} had {expected:.4f} there, band ±{band:.4f}: "
        )
        return added, line + self._verdict(reference, status, gap)

    @staticmethod
    def _verdict(reference: Reference, status: str, gap: float) -> str:
        end_only = " (compared at the end only: another schedule)" if reference.compares_end_only else ""
        if status == "inside":
            return "inside the band" + (end_only or " again")
        if status == "better":
            return f"better by {-gap:.4f}{end_only}"
        differences = "; ".join(reference.differences) or "none in optim, dropout, init or batch"
        return (
            f"WARNING, worse by {gap:.4f}{end_only}. Check the settings that differ from the reference "
            f"({differences}), the gradient norm and the learning rate in the report, and whether the data is intact "
            "(myllm data verify)"
        )
