"""A ladder in words and figures, for the terminal, report.html and plots/, from its ladder.json and ablation.json."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from myllm.files import write_text
from myllm.formatting import format_duration, format_number, format_si, format_table
from myllm.runs.report.page import embed_png, page_template, save_figure

from .ablation import describe_ablation
from .analysis import PUBLISHED
from .cells import read_results
from .plots import draw_ablation, draw_losses, draw_multipliers, draw_search
from .search import describe_search

CANNOT = (
    "Not shown by a ladder: the loss at the size and length of the extrapolation, parts that gain less than the noise "
    "here, the best batch size, the best warm-up, or stability over thousands of steps."
)
PIXELS_PER_INCH = 70
"""At least, so that a figure is legible: on a phone, wide ones scroll."""
Values = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Draw the figures into plots/ and write report.html. In the ladder's folder, ablation.json may be missing."""
    ladder = read_results(folder / "ladder.json")
    sections, ablation = _sections(ladder), folder / "ablation.json"
    if ablation.is_file():
        found = read_results(ablation)
        sections.append(("Without one part", draw_ablation(found), describe_ablation(found)))
    (folder / "plots").mkdir(exist_ok=True)
    shown = []
    for title, figure, text in sections:
        path = folder / "plots" / f"{title.lower().replace(' ', '_')}.png"
        if figure:
            save_figure(figure, path)
        shown.append({
            "title": title, "text": text, "image": figure and embed_png(path.read_bytes()),
            "width": figure and round(PIXELS_PER_INCH * figure.get_figwidth()),
        })  # fmt: skip
    write_text(folder / "report.html", page_template(__package__).render(
        name=ladder["name"], subtitle=f"{' · '.join(ladder['recipes'])} · {ladder['dataset']}", cards=_cards(ladder),
        sections=shown, cells=ladder["cells"], format_si=format_si,
    ))  # fmt: skip
    return folder / "report.html"


def _sections(ladder: Values) -> list[tuple[str, Figure | None, str]]:
    """Title, figure and text of each part of the page."""
    analysis, rates = ladder["analysis"], ladder["rates"]
    has_law = not all("missing" in analysis[law] for law in ("per_size", "joint"))
    sections: list[tuple[str, Figure | None, str]] = [
        ("Losses", draw_losses(ladder), describe_matches(analysis["matches"])),
        ("Fewer tokens", draw_multipliers(ladder) if has_law else None, describe_sizes(analysis)),
        ("One law for all cells", None, describe_joint(analysis)),
    ]
    if search := rates.get("search"):
        sections.append(("Rates", draw_search(search), describe_search(search, rates["checks"])))
    return sections


def _cards(ladder: Values) -> list[tuple[str, str, str]]:
    """The number of runs, and tokens to the same loss at the largest rung, by interpolation between runs."""
    cells, analysis = ladder["cells"], ladder["analysis"]
    took = format_duration(sum(cell["seconds"] for cell in cells))
    cards = [("Runs", str(len(cells)), f"{took} of training")]
    for row in analysis["matches"]:
        is_largest = (row["parameters"], row["tokens"]) == (analysis["parameters"][-1], analysis["tokens"][-1])
        if is_largest and not math.isnan(row["tokens_needed"]):
            ratio = row["token_ratio"]
            note = f"fewer tokens, {_range(ratio)}, largest rung"
            cards.append((f"{row['second']} against {row['first']}", f"{ratio['value']:.2f}x", note))
    return cards


# -- words -------------------------------------------------------------------------------------------------------------


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
        measured = "not measured yet"
        if not math.isnan(row["loss"]):
            measured = f"measured {row['loss']:.4f}, error {row['error']['value']:+.4f}"
            if not math.isnan(row["error"]["low"]):
                measured += ", inside the band" if row["inside"] else ", OUTSIDE the band"
        lines.append(
            f"held out, largest rung of {row['recipe']}: predicted {row['predicted']['value']:.4f} "
            f"({_range(row['predicted'], 4)}), {measured}"
        )
    return lines


def _range(band: Values, digits: int = 2) -> str:
    low, high = band["low"], band["high"]
    return f"{low:.{digits}f} to {high:.{digits}f}" if math.isfinite(low) and math.isfinite(high) else "no band"
