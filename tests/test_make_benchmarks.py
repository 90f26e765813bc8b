"""Lines of the benchmark become the published table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("make_benchmarks")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks" / "results.jsonl")
    monkeypatch.setattr(module, "README", tmp_path / "R.md")
    return module


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def line(contender: str, image_s: float | None = 2.0, **changed: Any) -> dict[str, Any]:
    budget_bytes = None if contender == "floor" else 8 * 2**30
    return {
        "model": "sdxl", "size": "1024x1024", "batch": 1, "steps": 30, "budget_bytes": budget_bytes,
        "contender": contender, "gpu": "G", "versions": {"torch": "2.11"}, "image_s": image_s,
        "peak_bytes": 7 * 2**30, "limit_s": None if contender == "floor" else 1.5, "error": None,
        "within_budget": True, **changed,
    }  # fmt: skip


LINES = (
    line("diffusers-resident", None, error="no", out_of_memory=True),
    line("autofit", 1.9),
    line("floor", 1.8),
    line("mmgp", 3.07, versions={"torch": "2.11", "mmgp": "3.8.2"}),
    line("diffusers-model-offload", 4.8, peak_bytes=5 * 2**30),
    line("diffusers-group-leaf", 1.0, within_budget=False),
    line("autofit", 2.5, budget_bytes=4 * 2**30),
)
TABLE = """G: torch 2.11, mmgp 3.8.2.

| model, size, steps | budget | limit | autofit | mmgp | diffusers' best |
|---|---|---|---|---|---|
| sdxl 1024x1024, 30 | 4 GiB | 1.5 s | 2.5 s (7.00 GiB) |  |  |
| sdxl 1024x1024, 30 | 8 GiB | 1.5 s | 1.9 s (7.00 GiB) | 3.07 s (7.00 GiB)\
 | 4.8 s (5.00 GiB) model-offload |
"""


@pytest.fixture
def publish(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str | int | None]:
    """Call the script on these lines; returns what it exits with, None for a plain return."""

    def call(*lines: dict[str, Any], check: bool = False) -> str | int | None:
        path = tmp_path / "new.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        given = ["--check"] if check else [str(path)]
        monkeypatch.setattr(sys, "argv", ["make_benchmarks.py", *given])
        try:
            make.main()
        except SystemExit as error:
            return error.code
        return None

    return call


def test_lines_become_a_table_that_check_holds(
    make: Any, publish: Callable[..., str | int | None]
) -> None:
    make.README.write_text(f"before\n{make.BEGIN}{make.END}\nafter\n")
    assert publish(*LINES) is None
    assert make.README.read_text() == f"before\n{make.BEGIN}{TABLE}{make.END}\nafter\n"
    assert publish(check=True) == 0
    kept = [(one["budget_bytes"], one["contender"]) for one in read(make.RESULTS)]
    assert kept[0] == (None, "floor")
    assert kept[1] == (4 * 2**30, "autofit")
    make.README.write_text(make.README.read_text().replace("1.9 s", "1.1 s"))
    assert "out of date" in str(publish(check=True))


def test_a_newer_line_takes_the_olders_place_on_its_gpu(
    make: Any, publish: Callable[..., str | int | None]
) -> None:
    make.README.write_text(f"{make.BEGIN}{make.END}")
    publish(*LINES)
    publish(line("autofit", 1.7), line("autofit", 9.0, gpu="H"))
    assert len(read(make.RESULTS)) == len(LINES) + 1
    text = make.README.read_text()
    assert "1.7 s" in text
    assert "1.9 s" not in text
    assert text.index("G: torch") < text.index("H: torch") < text.index("9 s")


def test_what_failed_is_said(make: Any) -> None:
    full = line("flextensor", None, error="CUDA", out_of_memory=True)
    over = line("mmgp", 3.0, within_budget=False)
    table = make.tables([full, over, line("diffusers-mm", None, error="no answer")])
    assert "| out of memory | 3 s (7.00 GiB, over) | failed |  |" in table


def rung(contender: str, image_s: float | None, **changed: Any) -> dict[str, Any]:
    facts = {"model": "sd15", "size": "512x512", "steps": 50, "budget_bytes": 24 * 2**30}
    return line(contender, image_s, **(facts | changed))


def test_a_ladder_is_a_table_of_its_own(make: Any) -> None:
    climbed = [
        rung("floor", 1.1, budget_bytes=None),
        rung("autofit-numeric", 0.5, peak_bytes=3 * 2**30),
        rung("ladder-float16", 2.0),
        rung("ladder-original", 4.0),
        rung("ladder-traced", None, error="no answer"),
    ]
    wanted = """\
The published ladder, sd15 512x512, 50 steps, on G: torch 2.11.

| rung, each with those above | image | times as fast | published, TITAN RTX |
|---|---|---|---|
| original | 4 s (7.00 GiB) | 1.00 | 9.50 s |
| float16 | 2 s (7.00 GiB) | 2.00 | 3.61 s |
| channels last |  |  | 3.30 s |
| traced UNet | failed |  | 3.21 s |
| memory-efficient attention |  |  | 2.63 s |
| autofit | 0.5 s (3.00 GiB) | 8.00 |  |
"""
    assert make.tables(make.merged([climbed])) == wanted
    assert make.tables(make.merged([[*climbed, *LINES]])) == f"{TABLE}\n{wanted}"


def test_a_ladder_without_its_lowest_rung_compares_nothing(make: Any) -> None:
    made = make.tables([rung("ladder-float16", 2.0), rung("autofit-numeric", 0.5)])
    assert "| float16 | 2 s (7.00 GiB) |  | 3.61 s |" in made
    assert "| autofit | 0.5 s (7.00 GiB) |  |  |" in made


def test_without_lines_no_place_is_needed(
    make: Any, publish: Callable[..., str | int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    make.README.write_text("no table\n")
    assert publish(check=True) is None
    assert "no benchmarks" in capsys.readouterr().out
    assert "no place for its table" in str(publish(*LINES))
    assert len(read(make.RESULTS)) == len(LINES), "kept, for when there is one"
    assert "no place for its table" in str(publish(check=True))


def test_the_published_table_is_what_the_lines_say() -> None:
    command = [sys.executable, SCRIPTS / "make_benchmarks.py", "--check"]
    subprocess.run(command, check=True, capture_output=True)


def test_exact_lines_have_the_bits_that_the_readme_says() -> None:
    lines = read(SCRIPTS.parent / "benchmarks" / "results.jsonl")

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in ("model", "size", "steps", "batch"))

    bits = {key(line): line["image_crc32"] for line in lines if line["contender"] == "floor"}
    made = [line for line in lines if line["contender"] == "autofit" and line["image_s"]]
    others = [line for line in made if line["image_crc32"] != bits[key(line)]]
    assert [(line["model"], line["budget_bytes"]) for line in others] == [("sdxl", 8 * 2**30)]
    assert len(made) > 8
