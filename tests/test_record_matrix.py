"""Every budget at every size, and what is shipped of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of the tiny model, by real trials."""
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        matrix = importlib.import_module("record_matrix")
        asked = ["", "--out", str(folder), "--only", "tiny-sd", "--limit", "3", "--device", "cpu"]
        path = folder / "results.jsonl"
        patch.setattr(sys, "argv", asked)
        matrix.main()
        whole = path.read_text("utf-8")
        matrix.main()
        assert path.read_text("utf-8") == whole, "what is done is not planned again"
        return list(map(json.loads, whole.splitlines()))


def test_each_cell_has_a_line_the_largest_budget_first(lines: list[dict[str, Any]]) -> None:
    assert [line["case"]["budget"] for line in lines] == ["2GiB", "1GiB", "2MiB", "1MiB"]


def test_a_line_has_the_command_that_made_it(lines: list[dict[str, Any]]) -> None:
    made = "python scripts/record_matrix.py --out DIR --only tiny-sd --limit 3"
    assert [line["command"] for line in lines] == [made] * 3 + [None]


def test_what_was_tried_is_known_to_the_next_budget(lines: list[dict[str, Any]]) -> None:
    more, less = (line["found"]["trials"] for line in lines[:2])
    assert less[: len(more)] == more
    assert len(less) <= len(more) + 2


def test_below_what_nothing_fits_nothing_is_tried(lines: list[dict[str, Any]]) -> None:
    in_vain, skipped = lines[2:4]
    assert in_vain["found"] is skipped["found"] is None
    assert in_vain["smallest_bytes"] == skipped["smallest_bytes"] > 2 * 2**20
    assert in_vain["plan_s"] > skipped["plan_s"] == 0


def test_profiles_are_shipped_and_shown(
    lines: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    make = importlib.import_module("make_profiles")
    readme, results, profiles = (tmp_path / n for n in ("README.md", "lines", "profiles"))
    profiles.mkdir()
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    readme.write_text(make.BEGIN + make.END, "utf-8")
    for name, path in (("PROFILES", profiles), ("README", readme), ("GOLDEN", tmp_path)):
        monkeypatch.setattr(make, name, path)
    monkeypatch.setattr(make, "TOO_SMALL", profiles / "too_small.json")
    monkeypatch.setattr(sys, "argv", ["make_profiles.py", str(results)])
    make.main()
    assert len(list(profiles.glob("*.yaml"))) == 2
    text = readme.read_text("utf-8")
    assert "| model, size, steps | card | 1 GiB | 2 GiB | smallest |" in text
    assert text.count("| tiny-sd ") == 1
    monkeypatch.setattr(sys, "argv", ["make_profiles.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        make.main()
    assert ended.value.code == 0
