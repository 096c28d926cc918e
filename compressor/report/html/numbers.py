"""Formatting of numbers for readers."""

import math

MISSING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: float | None) -> float | None:
    """Return a value that can be drawn; None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def number(value: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """Format a number with a number of significant digits; with a power of ten if it is very small or large."""
    if value is None or math.isnan(value):
        return MISSING
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    value = abs(value)
    if value == 0:
        return "0"
    if math.isinf(value):
        return f"{sign}∞"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if 1e-3 <= value < 1e6:
        return f"{sign}{value:,.{max(0, digits - 1 - int(exponent))}f}"
    return f"{sign}{mantissa} × {power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """Format 10ⁿ."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def percent(share: float | None, decimals: int = 1, *, signed: bool = False) -> str:
    """Format a fraction in percent."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{share:{'+' if signed else ''}.{decimals}%}".replace("-", "−")


def size(count: float | None) -> str:
    """Format a number of bytes in decimal units."""
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float | None) -> str:
    """Format a time in its two largest units; below a minute in one."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
