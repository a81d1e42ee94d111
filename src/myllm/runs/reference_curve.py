"""A published run to compare with: its validation loss and HellaSwag by tokens, and a watch that warns early.

The figures are in reference.json. Only published points are there; `Curve.at` draws a line over log tokens between.

How wide the bands are, and why:

- validation, 0.05 nats. Leave one published point out and the line misses it by 0.01 to 0.03; our held-out documents
  are others than the reference's, and so are the seeds. At the end of the curve, a quarter more tokens buy 0.05 nats.
- HellaSwag, two standard errors of the difference of two measured shares: 1.35 points on all 10,042 examples, more
  where a run asks fewer.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from myllm.config import to_dict
from myllm.data.sources.catalog import actual_source
from myllm.presets import get_preset

from .history import section

Row = dict[str, Any]

SLACK = 0.01
"""A run this share before the first point, or past the last, is compared with that point."""
TRAINED_OTHERWISE = {
    "vocab_multiple", "init", "dropout_embedding", "dropout_attention_residual", "dropout_ffn", "residual_dtype",
}  # fmt: skip
"""Settings of the model that may differ: they change how it learns, not what it is."""
TITLES = {"validation": "validation loss", "hellaswag": "HellaSwag accuracy"}


@dataclass(frozen=True)
class Curve:
    """The published figures of one evaluation."""

    key: str
    """Of the figure in the evaluation's row."""
    lower_is_better: bool
    band: float
    """How far to either side is no news."""
    tokens: tuple[int, ...]
    """Rising."""
    values: tuple[float, ...]

    def at(self, tokens: float) -> float | None:
        """The value after so many tokens, on a straight line over log tokens; None outside of what was published."""
        first, last = self.tokens[0], self.tokens[-1]
        if not first * (1 - SLACK) <= tokens <= last * (1 + SLACK):
            return None
        tokens = min(max(tokens, first), last)
        for index in range(1, len(self.tokens)):
            if tokens <= self.tokens[index]:
                before, after = self.tokens[index - 1], self.tokens[index]
                share = math.log(tokens / before) / math.log(after / before)
                return self.values[index - 1] + share * (self.values[index] - self.values[index - 1])
        return self.values[-1]

    def width(self, figures: Row) -> float:
        """The band for one measurement: wider if its own standard error is larger than the published figure's."""
        error = figures.get(f"{self.key}_stderr")
        if not error:
            return self.band
        published = self.band / math.sqrt(8)  # the band is two standard errors of a difference: 2 sqrt(2) of one
        return 2 * math.hypot(published, max(error, published))


@dataclass(frozen=True)
class Reference:
    """A published run, as far as it can be compared with."""

    name: str
    curves: dict[str, Curve]
    """By the evaluation's name."""
    batch_tokens: int
    """Tokens a step of the run that is compared."""
    differences: tuple[str, ...] = ()
    """In how the run is trained, as "optim.max_lr 0.001 (reference: 0.0021)"."""


def find_reference(config: Row) -> Reference | None:
    """The published run that a run of this config (as JSON values) repeats, or None.

    That is one of the same model on the same data for as many tokens: context, vocabulary and source decide what a
    loss means, and the planned length decides when the rate decays. The run's name, its rate, batch and dropout may
    be others: to compare those is what the curve is for.
    """
    published = json.loads(files(__package__).joinpath("reference.json").read_text(encoding="utf-8"))
    original = to_dict(get_preset(published["preset"]))
    model, data, train = (section(config, part) for part in ("model", "data", "train"))
    shape = original["model"].keys() - TRAINED_OTHERWISE
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
    counts = (train.get("max_steps"), train.get("batch_tokens"))
    return math.prod(counts) if all(isinstance(count, int) for count in counts) else 0


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
    compared = [("model", key) for key in sorted(TRAINED_OTHERWISE - {"vocab_multiple"})]
    compared += [("optim", key) for key in original["optim"]] + [("train", "batch_tokens")]
    for part, key in compared:
        expected = original[part][key]
        if (value := section(config, part).get(key, expected)) != expected:
            yield f"{part}.{key} {value} (reference: {expected})"


class ReferenceWatch:
    """Compares each evaluation with the published curve, and says when a run leaves the band or comes back.

    It does not repeat itself: a run that stays outside is only spoken of again when it is worse by another band's
    width. A run that is better is mentioned once and is no cause for alarm.
    """

    def __init__(self, reference: Reference | None, earlier: Iterable[Row] = ()) -> None:
        """
        Args:
            earlier: the rows of the run so far: what was said of them before a restart is not said again.
        """
        self._reference = reference
        self._said: dict[str, tuple[str, float]] = {}
        for row in earlier if reference else ():
            if row.get("kind") == "eval":
                self.compare(str(row.get("name")), row["step"], row)

    def compare(self, name: str, step: int, figures: Row) -> tuple[Row, str | None]:
        """One evaluation beside the curve.

        Returns:
            what to add to its row, nothing where there is nothing to compare with; and a line for people, or None.
        """
        curve = self._reference.curves.get(name) if self._reference else None
        tokens = step * self._reference.batch_tokens if curve else 0
        expected = curve.at(tokens) if curve else None
        if expected is None or curve.key not in figures:
            return {}, None
        value, width = figures[curve.key], curve.width(figures)
        gap = value - expected if curve.lower_is_better else expected - value
        gap = gap if math.isfinite(gap) else math.inf
        status = "worse" if gap > width else "better" if gap < -width else "inside"
        before, said_gap = self._said.get(name, ("inside", 0.0))
        added = {"reference": expected, "reference_band": width, "reference_status": status}
        if status == before and not (status == "worse" and gap > said_gap + width):
            return added, None
        self._said[name] = (status, gap)
        line = (
            f"{TITLES.get(name, name)} {value:.4f} at step {step:,} ({tokens / 1e9:.3g}B tokens); the reference run "
            f"{self._reference.name} had {expected:.4f} there, band ±{width:.4f}: "
        )
        return added, line + self._verdict(status, gap)

    def _verdict(self, status: str, gap: float) -> str:
        if status == "inside":
            return "inside the band again"
        if status == "better":
            return f"better by {-gap:.4f}"
        differences = "; ".join(self._reference.differences) or "none in optim, dropout, init or batch"
        return (
            f"WARNING, worse by {gap:.4f}. What to check: settings that differ from the reference's ({differences}), "
            "the gradient norm and the rate in the report, and whether the data are whole (myllm data verify)"
        )
