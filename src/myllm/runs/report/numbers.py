"""How figures are written for people, on pages, plots and model cards."""

import math


def si(value: float, digits: int = 3) -> str:
    """1234567 as 1.23M. A thousand million is B, as is usual for tokens and parameters."""
    if not math.isfinite(value):
        return short(value)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,999 is 1M, not 1000k: rounded to the digits shown, it has reached the next unit.
        if abs(float(f"{value:.{digits}g}")) >= size:
            return f"{float(f'{value / size:.{digits}g}'):g}{unit}"
    return f"{float(f'{value:.{digits}g}'):g}"


def short(value: float) -> str:
    """Three digits that count: 3.31, 0.0021, 6e-5, NaN."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e") if abs(value) < 1_000 else si(value)


def percent(value: float) -> str:
    return f"{value * 100:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else short(value)


def duration(seconds: float) -> str:
    """8000 as "2 h 13 min"; empty where it is unknown."""
    if not math.isfinite(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
