"""Numbers in words: how pages, tables and figures write them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np


def number(value: float) -> str:
    """Three significant digits, thousands separated: 0.00123, 4.56, 1,230."""
    if not math.isfinite(value):
        return "none"
    if 0 < abs(value) < 1e-4 or abs(value) >= 1e7:
        return f"{value:.2e}"
    value = float(f"{value:.2e}")
    return f"{value:,.{_decimals(value, 3)}f}"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s or 3 h 25 min; none if it is not finite."""
    if not math.isfinite(seconds):
        return "none"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def short(value: float) -> str:
    """A number in few characters: 0.043, 1.6, 87, 1,240, 3e+06."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}"
    return f"{value:,.{_decimals(value, 2)}f}"


def plain(value: Any) -> str:
    """A setting in words: 0.0003 rather than 3e-04, 1,000,000; other values as they are."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return str(value)
    number = float(value)
    if number and not 1e-6 <= abs(number) < 1e15:
        return f"{number:g}"
    text = np.format_float_positional(number, trim="-")
    whole, point, rest = text.partition(".")
    return f"{int(whole):,}{point}{rest}" if abs(number) >= 10_000 else text


def count(number: int, what: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def compact(value: float) -> str:
    """1e5 and beyond by their exponent."""
    return f"{value:,.0f}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e")


def seconds(value: float) -> str:
    """12.3 us, 4.56 ms, 7.89 s."""
    unit, scale = next((u, s) for u, s in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)) if value < 999.5 * s or u == "s")
    return f"{significant(value / scale)} {unit}"


def significant(value: float) -> str:
    """Three significant digits, or all of an integer's, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    value = float(f"{value:.2e}")  # 0.9999 is 1.00
    return f"{value:.{min(_decimals(value, 3), 4)}f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals after which a number has so many significant digits."""
    return max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
