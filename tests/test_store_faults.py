"""A file that is no profile is refused in one line that names the file and the field."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from autofit import store
from autofit.spec import BadInput

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", params=[1, 2])
def schema(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def golden(schema: int) -> str:
    """The text of the golden profile of each schema."""
    return (GOLDEN / f"profile-{schema}.yaml").read_text("utf-8")


def error_of(path: Path) -> str:
    """The message for a file that is no profile, without the file's name."""
    with pytest.raises(BadInput) as error:
        store.load(path)
    return reason(path, error.value)


def reason(path: Path, error: BadInput) -> str:
    """What the message says: one line that begins with the file."""
    message = str(error)
    assert message.startswith(f"profile {path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"profile {path}: ")


def of_schema(text: str, value: str) -> str:
    return re.sub(r"(?m)^schema: \d", f"schema: {value}", text)


def without(text: str, line: str) -> str:
    return "".join(t for t in text.splitlines(keepends=True) if not t.strip().startswith(line))


def within(key: str, old: str, new: str) -> Callable[[str], str]:
    """Replace the first that follows a key."""

    def change(text: str) -> str:
        before, found, after = text.partition(key)
        return before + found + after.replace(old, new, 1)

    return change


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
        (lambda t: of_schema(t, "3"), "schema 3 is newer than this autofit reads (2): upgrade"),
        (lambda t: of_schema(t, "one"), "schema: Input should be 2, not 'one'"),
        (lambda t: of_schema(t, "0"), "schema: Input should be 2, not 0"),
        (lambda t: of_schema(t, "true"), "schema: Input should be 2, not True"),
        (lambda t: of_schema(t, "1.0"), "schema: Input should be 2, not 1.0"),
        (lambda t: t + "predicted: {}\n", "a prediction, which nothing measured: run autofit plan"),
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
        (lambda t: of_schema(t, "&a 1"), "not YAML: line 3: anchors are not read"),
        (lambda t: of_schema(t, "!!int 1"), "not YAML: line 3: tags are not read"),
        (lambda t: t + "x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        (lambda t: t + "#" * store.MAX_BYTES, "larger than 1.00 MiB: not a profile"),
        (lambda t: of_schema(t, "9" * 5000), "schema: Input should be 2"),
        (
            lambda t: t.replace("5d41402abc4b2a76", '"\\ud800"'),
            "half of a Unicode character (a lone surrogate): remove it",
        ),
    ],
)
def test_what_is_wrong_is_named(
    golden: str, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    assert message in error_of(changed(golden, change, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (within("components", "weight_bytes: 334615452", "weight_bytes: many"),
         "pipeline.components.0.weight_bytes: Input should be a valid integer"),
        (within("components", "dtype: float32", "type: float32"),
         "missing field pipeline.components.0.dtype"),
        (within("adapters", "[lineart]", "lineart"), "pipeline.adapters: Input should be a valid"),
        (within("pinned", "55400000000.0", "fast"), "on.pinned_bytes_s: Input should be a valid"),
        (within("ladder", "model_offload", "model_ofload"),
         "ladder.0.plan.1: no technique 'model_ofload': did you mean 'model_offload'?"),
        (within("ladder", "dtype: float16", "dtype: float7"), "ladder.0.plan.0"),
        (within("ladder", "dtype: float16", "kind: float16"),
         "unknown field 'ladder.0.plan.0.kind'"),
        (within("ladder", "- technique: model_offload", "- technique: sliced_vae"),
         "ladder.0.plan: plan half_precision(dtype=float16) + sliced_vae: one placement"),
        (within("ladder", "image_s: 2.75", "image_s: 0.0"),
         "ladder.0.measured: image_s must be a time above zero"),
        (within("ladder", "peak_bytes: 2411724800", "peak_bytes: -1"),
         "ladder.0.measured: peak_bytes must not be negative"),
        (within("evidence", "image_s: 0.8541", "image_s: .inf"),
         "evidence.0.measured: image_s must be a time above zero"),
        (within("evidence", "cap: emulated", "cap: none"), "evidence.0.on.cap: Input should be"),
        (within("evidence", "why: out of memory", "why: bad luck"),
         "evidence.1.failure.why: Input should be 'out of memory', 'over budget'"),
        (within("evidence", "phase: decode", "phase: lunch"), "evidence.1.failure.phase: Input"),
        (within("evidence", "    phase: decode", "    detail: no /home/ada"),
         "unknown field 'evidence.1.failure.detail'"),
        (within("evidence", "- failure:", "- failed:"), "unknown field 'evidence.1.failed'"),
        (within("evidence", "needed_bytes: 4831838208", "needed_bytes: some"),
         "evidence.1.failure.needed_bytes: Input should be a valid integer"),
        (lambda t: t + "ladder: []\n", "'ladder' is there twice"),
        (lambda t: t[: t.index("ladder:")] + "ladder: {}\n", "ladder: Input should be a valid"),
        (lambda t: t[: t.index("evidence:")] + "evidence: [1]\n",
         "evidence.0: Input should be an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_what_schema_2_added_is_named(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    text = (GOLDEN / "profile-2.yaml").read_text("utf-8")
    assert message in error_of(changed(text, change, tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        within("evidence", "- measured:\n", "- failure: {why: crash}\n  measured:\n"),
        lambda t: (
            t[: t.index("- failure:")] + "- on: {device: a, capability: null, total_bytes: 1,"
            " cap: card, versions: {}}\n"
        ),
    ],
    ids=["both", "neither"],
)
def test_evidence_is_a_measurement_or_a_failure(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    path = changed((GOLDEN / "profile-2.yaml").read_text("utf-8"), change, tmp_path)
    assert re.fullmatch(r"evidence\.[01]: one of measured and failure", error_of(path))


def changed(text: str, change: Callable[[str], str], folder: Path) -> Path:
    """A file of the text with a fault in it."""
    after = change(text)
    assert after != text
    path = folder / "profile.yaml"
    path.write_text(after, "utf-8")
    return path


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


def test_mutated_files_are_profiles_or_one_line_errors(golden: str, tmp_path: Path) -> None:
    rng, path, refusals = random.Random(1), tmp_path / "profile.yaml", []
    for _ in range(500):
        path.write_bytes(mutated(golden, rng))
        try:
            found = store.load(path)
        except BadInput as error:
            refusals.append(reason(path, error))
        else:
            store.save(found, path)
            assert store.load(path) == found
    assert all(refusals)
    assert 300 < len(refusals) < 500
