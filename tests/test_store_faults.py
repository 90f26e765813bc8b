"""A file that is no profile is refused in one line that names the file and the field."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from autofit import store
from autofit.spec import BadInput, Profile

GOLDEN = Path(__file__).parent / "golden" / "profile-1.yaml"


def error_of(path: Path) -> str:
    """The message for a file that is no profile: one line that begins with the file."""
    with pytest.raises(BadInput) as error:
        store.load(path)
    message = str(error.value)
    assert message.startswith(f"profile {path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"profile {path}: ")


def without(text: str, line: str) -> str:
    return "".join(t for t in text.splitlines(keepends=True) if not t.strip().startswith(line))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: "a: [", "not YAML: line 1: "),
        (lambda t: t + "\x07", "not YAML: special characters are not allowed"),
        (lambda t: t + "---\n" + t, "not YAML: line "),
        (lambda t: "", "not a mapping"),
        (lambda t: "- 1\n", "not a mapping"),
        (lambda t: without(t, "schema"), "missing field schema"),
        (lambda t: without(t, "peak_bytes"), "missing field measured.peak_bytes"),
        (lambda t: without(t, "- technique: tiled"), "unknown field 'plan.0.tile_px'"),
        (lambda t: t.replace("technique: tiled", "mode: tiled"), "missing field plan.1.technique"),
        (lambda t: without(t, "tile_px"), "missing field plan.1.tile_px"),
        (
            lambda t: t.replace("schema: 1", "schema: 2"),
            "schema 2 is newer than this autofit reads",
        ),
        (lambda t: t.replace("schema: 1", "schema: one"), "schema: Input should be 1, not 'one'"),
        (lambda t: t.replace("schema: 1", "schema: 0"), "schema: Input should be 1, not 0"),
        (lambda t: t.replace("tiled_vae", "tiled_va"), "did you mean 'tiled_vae'?"),
        (lambda t: t.replace("tiled_vae", "quux"), "plan.1: no technique 'quux': there are "),
        (lambda t: t.replace("tile_px: 512", "tile_px: small"), "plan.1.tile_px: Input should be"),
        (lambda t: t.replace("tile_px: 512", "tile_px: 500"), "tile_px"),
        (lambda t: t.replace("tile_px: 512", "tile: 512"), "plan.1.tile"),
        (lambda t: t.replace("  sliced: false", "  slow: false"), "unknown field 'plan.1.slow'"),
        (
            lambda t: t.replace("steps: 50", "steps: 50.5"),
            "workload.steps: Input should be a valid",
        ),
        (
            lambda t: t.replace("steps: 50", "steps: '50'"),
            "workload.steps: Input should be a valid",
        ),
        (
            lambda t: t.replace("steps: 50", "steps: true"),
            "workload.steps: Input should be a valid",
        ),
        (lambda t: t.replace("steps: 50", "steps: 0"), "workload: steps must be at least 1"),
        (lambda t: t.replace("4294967296", "-1"), "budget_bytes: Input should be greater than 0"),
        (lambda t: t.replace("image_s: 0.86", "image_s: -0.86"), "measured: image_s must be"),
        (
            lambda t: t.replace("image_s: 0.8653124", "image_s: .nan"),
            "measured: image_s must be",
        ),
        (lambda t: t.replace("verified:", "verifed:"), "unknown field 'measured.verifed'"),
        (lambda t: t.replace("emulated", "guessed"), "on.cap: Input should be 'emulated', 'card'"),
        (lambda t: t.replace("'13.0'", "13.0"), "on.versions.cuda: Input should be a valid string"),
        (lambda t: t.replace("steps: 50", "steps: 50\n  steps: 5"), "'steps' is there twice"),
        (lambda t: without(t, "- technique: resident"), "one placement, at most one technique a"),
        (
            lambda t: t.replace("schema: 1", "schema: &a 1"),
            "not YAML: line 3: anchors are not read",
        ),
        (
            lambda t: t.replace("schema: 1", "schema: !!int 1"),
            "not YAML: line 3: tags are not read",
        ),
        (lambda t: t + "x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        (lambda t: t + "#" * store.MAX_BYTES, "larger than 1.00 MiB: not a profile"),
        (lambda t: t.replace("schema: 1", "schema: " + "9" * 5000), "schema: Input should be 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = tmp_path / "profile.yaml"
    before = GOLDEN.read_text("utf-8")
    after = change(before)
    assert after != before
    path.write_text(after, "utf-8")
    assert message in error_of(path)


def test_a_missing_file_a_folder_and_a_binary_file_are_bad_input(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.yaml").startswith("cannot be read (No such file")
    assert error_of(tmp_path).startswith("cannot be read (Is a directory)")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff")
    assert "not UTF-8 text" in error_of(tmp_path / "image.png")
    with pytest.raises(BadInput, match="null byte"):
        store.load("a\0b")


def mutated(text: str, rng: random.Random) -> bytes:
    """The text after a few accidents of an editor, a disk or a merge."""
    words = [
        "",
        "null",
        "-1",
        "1e999",
        "[]",
        "{}",
        "'",
        '"',
        ": ",
        "- ",
        "!!binary x",
        "*a",
        "\t",
        "∞",
    ]
    raw = text
    for _ in range(rng.randint(1, 4)):
        lines = raw.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        key = lines[at].partition(":")[0]
        accident = rng.randrange(6)
        if accident == 0:
            del lines[at]
        elif accident == 1:
            lines[at] = f"{key}: {rng.choice(words)}\n"
        elif accident == 2:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif accident == 3:
            lines[at] = "  " + lines[at]
        elif accident == 4:
            cut = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:cut] + rng.choice(words) + lines[at][cut:]
        else:
            lines = lines[: at + 1]
        raw = "".join(lines) or "\n"
    data = bytearray(raw.encode("utf-8"))
    if rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def test_mutated_files_are_profiles_or_one_line_errors(tmp_path: Path) -> None:
    rng = random.Random(1)
    text, path, refused = GOLDEN.read_text("utf-8"), tmp_path / "profile.yaml", 0
    for _ in range(250):
        path.write_bytes(mutated(text, rng))
        try:
            assert isinstance(store.load(path), Profile)
        except BadInput:
            error_of(path)
            refused += 1
    assert refused > 150
