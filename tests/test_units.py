from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.spec import BadInput
from autofit.units import (
    format_bytes,
    format_seconds,
    parse_duration,
    parse_pixels,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8gb", 8 * 10**9),
        ("8gIb", 8 * 2**30),
        (" 8 GB ", 8 * 10**9),
        ("7.5GiB", 15 * 2**29),
        ("0.1GB", 10**8),
        ("512MiB", 2**29),
        ("512MB", 512 * 10**6),
        ("1TiB", 2**40),
        ("1tb", 10**12),
        ("4KiB", 4096),
        ("1kB", 1000),
        ("17B", 17),
        ("+8GB", 8 * 10**9),
    ],
)
def test_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["8", "8 parsecs", "8G", "8M", "7.5 gigs"])
def test_a_size_without_a_known_unit_shows_both_readings(text: str) -> None:
    number = text.split()[0].rstrip("GM")
    with pytest.raises(BadInput) as error:
        parse_size(text)
    assert repr(text) in str(error.value)
    assert f"{number}GB ({number}·10⁹ bytes)" in str(error.value)
    assert f"{number}GiB ({number}·2³⁰ bytes)" in str(error.value)


@pytest.mark.parametrize("text", ["-1GB", "0GB", "0.0GiB", "0.5B"])
def test_a_size_must_be_above_zero(text: str) -> None:
    with pytest.raises(BadInput, match="not above zero; write for example 8GB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "GB", "8GB8", "1e9B", "1,5GB", "nanGB", "8 GB GB", ".5GB"])
def test_a_size_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadInput, match=r"write for example 8GB or 7\.5GiB"):
        parse_size(text)


@given(st.integers(1, 10**6), st.sampled_from(["B", "KB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_sizes_ignore_case_and_spaces_and_are_whole(number: int, unit: str) -> None:
    power = {"K": 1, "M": 2, "G": 3}.get(unit[0], 0)
    expected = number * (1024 if "i" in unit else 1000) ** power
    for text in (f"{number}{unit}", f"{number} {unit.lower()}", f" {number}.0{unit.upper()} "):
        assert parse_size(text) == expected


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_one_line_error(text: str) -> None:
    try:
        answer: int | str = parse_size(text)
    except BadInput as error:
        answer = str(error)
    assert answer > 0 if isinstance(answer, int) else len(answer.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "pixels"),
    [("1024x768", (1024, 768)), ("64X64", (64, 64)), (" 3840 × 2160 ", (3840, 2160))],
)
def test_pixels(text: str, pixels: tuple[int, int]) -> None:
    assert parse_pixels(text) == pixels


@pytest.mark.parametrize("text", ["", "1024", "0x64", "64x000", "64x-8", "64.0x64", "1x2x3", "axb"])
def test_pixels_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadInput, match="write for example 1024x1024"):
        parse_pixels(text)


@given(st.integers(1, 99999), st.integers(1, 99999))
def test_pixels_round_trip(width: int, height: int) -> None:
    assert parse_pixels(f"{width}x{height}") == (width, height)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("10 MIN", 600.0), ("1.5h", 5400.0)],
)
def test_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5s", "10 days", "soon", "1h30m"])
def test_a_duration_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadInput, match="write for example 90s or 10m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2**10, "1.00 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (8 * 10**9, "7.45 GiB"),
        (-(2**30), "-1.00 GiB"),
    ],
)
def test_bytes_for_a_reader(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@given(st.integers(1, 2**50))
def test_bytes_for_a_reader_are_within_their_last_digit(size_bytes: int) -> None:
    assert parse_size(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0153, "15.3 ms"), (0.8651, "0.865 s"), (25.5, "25.5 s"), (185.4, "3m05s")],
)
def test_seconds_for_a_reader(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
