"""The analysis of a ladder in words, for the terminal and the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from myllm.formatting import format_number, format_si, format_table

from .analysis import PUBLISHED

CANNOT = (
    "Not shown by a ladder: the loss at the size and length of the extrapolation, parts that gain less than the noise "
    "here, the best batch size, the best warm-up, or stability over thousands of steps."
)
Values = Mapping[str, Any]


def describe_analysis(analysis: Values) -> str:
    """All figures as text."""
    return "\n\n".join([describe_matches(analysis["matches"]), describe_sizes(analysis), describe_joint(analysis)])


def describe_matches(rows: Sequence[Values]) -> str:
    """Tokens and time to the same loss, without a law."""
    table = [["", "N", "tokens", "loss", "reached after", "fewer tokens", "95 % band", "less time"]]
    for row in rows:
        if math.isnan(row["tokens_needed"]):
            continue  # a run is missing
        ratio, bound = row["token_ratio"], row["bound"]
        sign = {"at least": ">= ", "at most": "<= ", None: ""}[bound]
        table.append([
            f"{row['second']} to the loss of {row['first']}", format_si(row["parameters"]), format_si(row["tokens"]),
            f"{row['loss']:.4f}", "" if bound else format_si(row["tokens_needed"]), f"{sign}{ratio['value']:.2f}x",
            "" if bound else _range(ratio), f"{sign}{row['time_ratio']['value']:.2f}x",
        ])  # fmt: skip
    header = "Tokens to the same final loss, interpolated between decayed runs; >= where the shortest is below it"
    return f"{header}\n{format_table(table, right=range(1, 8))}"


def describe_sizes(analysis: Values) -> str:
    """Multipliers by a law at each size."""
    laws = analysis["per_size"]
    if "missing" in laws:
        return f"no law at each size: {laws['missing']}"
    header = f"L = E + A D^-b of {analysis['pairs'][0][0]} at each size, b = {laws['b']:.3f}: fewer tokens by this law"
    return "\n".join([header, _multiplier_table(analysis, laws), *_describe_held_out(laws["held_out"])])


def describe_joint(analysis: Values) -> str:
    """The joint law, and its extrapolation."""
    law = analysis["joint"]
    if "missing" in law:
        return f"no joint law and no extrapolation: {law['missing']}"
    constants = ", ".join(f"{name} {format_number(value)}" for name, value in law["constants"].items())
    lines = [f"L = E + A N^-a + B (m N^g D)^-b of all recipes and sizes ({constants}): fewer tokens by this law"]
    lines.append(_multiplier_table(analysis, law))
    for (first, second), slope in zip(analysis["pairs"], law["g"], strict=True):
        lines.append(f"{second} against {first}: m changes with size as N^{slope['value']:.3f} ({_range(slope, 3)})")
    lines += _describe_held_out(law["held_out"])
    return "\n".join([*lines, "", *_describe_extrapolation(analysis["pairs"], law["extrapolation"])])


def _describe_extrapolation(pairs: Sequence[Sequence[str]], beyond: Values) -> list[str]:
    lines = [
        f"EXTRAPOLATION to {beyond['to']}, {format_si(beyond['parameters_factor'])} times the largest N and "
        f"{format_si(beyond['tokens_factor'])} times the longest D of this ladder:"
    ]
    for (first, second), band in zip(pairs, beyond["multipliers"], strict=True):
        lines.append(f"  {second} against {first}: band {_range(band)}")
    low, high = PUBLISHED
    lines.append(f"  published for Muon against a tuned AdamW at 300M: {low:g} to {high:g} (Marin, optimizer_sweep)")
    return [*lines, f"  {CANNOT}"]


def _multiplier_table(analysis: Values, law: Values) -> str:
    rows = [["", *(f"N {format_si(size)}" for size in analysis["parameters"])]]
    for (first, second), bands in zip(analysis["pairs"], law["multipliers"], strict=True):
        rows.append([f"{second} against {first}", *(f"{band['value']:.2f}x ({_range(band)})" for band in bands)])
    return format_table(rows, right=range(1, len(rows[0])))


def _describe_held_out(rows: Sequence[Values]) -> list[str]:
    lines = []
    for row in rows:
        measured = (
            f"measured {row['loss']:.4f}, error {row['error']['value']:+.4f}, "
            f"{'inside' if row['inside'] else 'OUTSIDE'} the band"
        )
        lines.append(
            f"held out, largest rung of {row['recipe']}: predicted {row['predicted']['value']:.4f} "
            f"({_range(row['predicted'], 4)}), {'not measured yet' if math.isnan(row['loss']) else measured}"
        )
    return lines


def _range(band: Values, digits: int = 2) -> str:
    low, high = band["low"], band["high"]
    return f"{low:.{digits}f} to {high:.{digits}f}" if math.isfinite(low) and math.isfinite(high) else "no band"
