"""Text to bytes, pixels and seconds, and back. The only file that knows what a GB is."""

from __future__ import annotations

import re
from decimal import Decimal

from autofit.spec import BadInput

_UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([+-]?\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_PIXELS = re.compile(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|min)?\s*")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

GIB = 2**30
MIB = 2**20


def parse_size(text: str, name: str = "size") -> int:
    """Read a size such as ``8GB`` (8·10⁹ bytes) or ``8GiB`` (8·2³⁰ bytes).

    Case does not matter and the unit is required. ``name`` is what the size is to the user.

    Raises:
        BadInput: no unit, an unknown unit, a negative number or zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadInput(
            f"{name} {text!r}: not a number with a unit; write for example 8GB or 7.5GiB"
        )
    number, unit = match.groups()
    if not unit:
        raise BadInput(
            f"{name} {text!r} has no unit; write {number}GB ({number}·10⁹ bytes)"
            f" or {number}GiB ({number}·2³⁰ bytes)"
        )
    if unit.lower() not in _UNITS:
        raise BadInput(
            f"{name} {text!r}: unknown unit {unit!r}; write {number}GB ({number}·10⁹ bytes)"
            f" or {number}GiB ({number}·2³⁰ bytes)"
        )
    size_bytes = int(Decimal(number) * _UNITS[unit.lower()])
    if size_bytes <= 0:
        raise BadInput(f"{name} {text!r} is not above zero; write for example 8GB")
    return size_bytes


def parse_pixels(text: str) -> tuple[int, int]:
    """Read ``1024x768`` as (width, height) in pixels.

    Raises:
        BadInput: anything else, or a side of zero.
    """
    match = _PIXELS.fullmatch(text)
    if match is None or "0" in (match[1].strip("0") or "0", match[2].strip("0") or "0"):
        raise BadInput(f"size {text!r}: not WIDTHxHEIGHT in pixels; write for example 1024x1024")
    return int(match[1]), int(match[2])


def parse_duration(text: str) -> float:
    """Read ``90``, ``90s``, ``10m`` or ``1h`` as seconds.

    Raises:
        BadInput: anything else, or zero.
    """
    match = _DURATION.fullmatch(text.lower())
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        raise BadInput(f"duration {text!r}: not a time above zero; write for example 90s or 10m")
    return seconds


def format_bytes(size_bytes: int) -> str:
    """Write bytes for a reader, in binary units: ``7.45 GiB``."""
    for name, unit in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} B"


def format_seconds(seconds: float) -> str:
    """Write seconds for a reader, three significant digits: ``0.865 s``, ``25.5 s``, ``3m05s``."""
    if seconds >= 100:
        return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"
