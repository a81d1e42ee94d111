"""Numbers that JSON does not have, in files that any reader of JSON takes."""

import math
from typing import Any

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no such numbers: they are written as texts."""


def json_safe(value: Any) -> Any:
    """The same for JSON: numbers that are not finite as NOT_FINITE spells them."""
    if isinstance(value, dict):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def restored(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with the numbers that `json_safe` spelled; one of samples, which has no kind, as it is."""
    if "kind" not in row:
        return row
    return {key: NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
