"""Values from files as numbers, intervals and texts of a page. Malformed values are left out."""

import math
from typing import Any

from maxlm.core.interval import Interval

_LONGEST_FACT = 60


def format_number(value: float) -> str:
    """Four significant digits with thousands separators: 1,234,567, 12.34, 0.001234; three for smaller values."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    text = f"{value:.{3 - math.floor(math.log10(abs(value)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def to_number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def to_interval(value: Any) -> Interval | None:
    """A number, or an object with `value` and optionally `low` and `high`."""
    if isinstance(value, dict):
        number = to_number(value.get("value"))
        low, high = to_number(value.get("low")), to_number(value.get("high"))
    else:
        number, low, high = to_number(value), None, None
    if number is None:
        return None
    return Interval(number, low, high) if low is not None and high is not None else Interval(number, None, None)


def to_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def to_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def percent(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"


def duration(seconds: float) -> str:
    """8.4 s, 3 min 20 s, 2 h 05 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def flat_facts(values: dict, *, limit: int = 24, prefix: str = "") -> list[tuple[str, str]]:
    """Scalars of nested objects as (name, text), at most `limit` of them."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        label = prefix + str(name).replace("_", " ")
        if isinstance(value, dict):
            found += flat_facts(value, limit=limit, prefix=f"{label}: ")
        elif isinstance(value, bool):
            found.append((label, "yes" if value else "no"))
        elif isinstance(value, str) and len(value) <= _LONGEST_FACT:
            found.append((label, value))
        elif (number := to_number(value)) is not None:
            found.append((label, format_number(number)))
    return found[:limit]
