"""report.html and plots/ of a ladder, from its ladder.json and ablation.json."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from myllm.files import write_text
from myllm.formatting import format_duration, format_si
from myllm.runs.report.page import embed_png, page_template, save_figure

from .ablation import describe_ablation
from .cells import read_results
from .plots import draw_ablation, draw_losses, draw_multipliers, draw_search
from .search import describe_search
from .summary import describe_joint, describe_matches, describe_sizes

Values = Mapping[str, Any]
PIXELS_PER_INCH = 70
"""At least, so that a figure is legible: on a phone, wide ones scroll."""


def write_report(folder: Path) -> Path:
    """Draw the figures into plots/ and write report.html. In the ladder's folder, ablation.json may be missing."""
    ladder = read_results(folder / "ladder.json")
    ablation = folder / "ablation.json"
    sections = _sections(ladder)
    if ablation.is_file():
        found = read_results(ablation)
        sections.append(("Without one part", draw_ablation(found), describe_ablation(found)))
    (folder / "plots").mkdir(exist_ok=True)
    shown = []
    for title, figure, text in sections:
        image, width = None, 0
        if figure is not None:
            width = round(PIXELS_PER_INCH * figure.get_figwidth())
            path = folder / "plots" / f"{title.lower().replace(' ', '_')}.png"
            save_figure(figure, path)
            image = embed_png(path.read_bytes())
        shown.append({"title": title, "image": image, "width": width, "text": text})
    seconds = sum(cell["seconds"] for cell in ladder["cells"])
    page = page_template(__package__).render(
        name=ladder["name"],
        subtitle=f"{' · '.join(ladder['recipes'])} · {ladder['dataset']}",
        cards=[
            ("Runs", str(len(ladder["cells"])), f"{format_duration(seconds)} of training"),
            *_multiplier_cards(ladder["analysis"]),
        ],
        sections=shown,
        cells=ladder["cells"],
        format_si=format_si,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _sections(ladder: Values) -> list[tuple[str, Any, str]]:
    """Title, figure and text of each part of the page."""
    analysis, rates = ladder["analysis"], ladder["rates"]
    has_law = not all("missing" in analysis[law] for law in ("per_size", "joint"))
    sections = [
        ("Losses", draw_losses(ladder), describe_matches(analysis["matches"])),
        ("Fewer tokens", draw_multipliers(ladder) if has_law else None, describe_sizes(analysis)),
        ("One law for all cells", None, describe_joint(analysis)),
    ]
    if search := rates.get("search"):
        sections.append(("Rates", draw_search(search), describe_search(search, rates["checks"])))
    return sections


def _multiplier_cards(analysis: Values) -> list[tuple[str, str, str]]:
    """Tokens to the same loss at the largest size and the longest length, by interpolation between runs."""
    longest = (analysis["parameters"][-1], analysis["tokens"][-1])
    cards = []
    for row in analysis["matches"]:
        if (row["parameters"], row["tokens"]) == longest and not math.isnan(row["tokens_needed"]):
            ratio = row["token_ratio"]
            band = f"{ratio['low']:.2f} to {ratio['high']:.2f}" if math.isfinite(ratio["low"]) else "no band"
            value = f"{ratio['value']:.2f}x"
            cards.append((f"{row['second']} against {row['first']}", value, f"fewer tokens, {band}, largest rung"))
    return cards
