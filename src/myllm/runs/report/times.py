"""Where a run's time went, as a bar and a table."""

from collections.abc import Mapping
from html import escape

from myllm.formatting import format_duration, format_percent

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
"""Of the longest, the second, and so on; the last for all that follow. Okabe and Ito 2008, told apart by nearly all."""


def times_section(seconds: Mapping[str, float]) -> str:
    """
    Args:
        seconds: by what was being done, longest first; all above 0.
    """
    total = sum(seconds.values())
    if not total:
        return ""
    bar, lines = [], ["<tr><th></th><th>Time</th><th>Share</th></tr>"]
    for number, (name, each) in enumerate(seconds.items()):
        colour, width = COLOURS[min(number, len(COLOURS) - 1)], 100 * each / total
        bar.append(f'<span style="width: {width:.3f}%; background: {colour}" title="{escape(name)}"></span>')
        lines.append(
            f'<tr><td class="name"><i style="background: {colour}"></i>{escape(name)}</td>'
            f"<td>{escape(format_duration(each))}</td><td>{escape(format_percent(each / total))}</td></tr>"
        )
    note = "All starts of the run. What a killed process lost counts once. Compiling is part of a first step."
    return (
        f'<h2>Where the time went</h2><div class="card times"><div class="parts">{"".join(bar)}</div>'
        f'<table>{"".join(lines)}</table></div><p class="note">{note}</p>'
    )
