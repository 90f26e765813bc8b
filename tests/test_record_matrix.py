"""Every budget at every size, and what is shipped of it."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples

from autofit import session, store
from autofit.architectures import ARCHITECTURES
from autofit.spec import Failure, Outcome, Slot
from autofit.trial import Request, Worker
from autofit.units import GIB

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = Path(__file__).parent.parent / "scripts"

Line = dict[str, Any]


@pytest.fixture(scope="module")
def matrix() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("record_matrix")


def run(matrix: Any, folder: Path, *more: str) -> str:
    asked = ["", "--out", str(folder), "--only", "tiny-sd", "--limit", "3", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*asked, *more])
        patch.setattr(session, "measuring", without_luck)
        matrix.main()
    return (folder / "results.jsonl").read_text("utf-8")


@contextmanager
def without_luck(*asked: Any, measuring: Any = session.measuring) -> Iterator[Worker]:
    """Real trials, of which those of half precision take longer, as they do on a CPU: which of two
    tiny plans is faster is luck, and with it which budgets are searched."""
    with measuring(*asked) as measurer:
        measure = measurer.measure

        def slowed(request: Request) -> Outcome:
            outcome = measure(request)
            if request.plan.at(Slot.PRECISION) is None or isinstance(outcome, Failure):
                return outcome
            return replace(outcome, image_s=3 * outcome.image_s)

        measurer.measure = slowed
        yield measurer


@pytest.fixture(scope="module")
def lines(matrix: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """Of the tiny model, by real trials."""
    folder = tmp_path_factory.mktemp("matrix")
    whole = run(matrix, folder)
    assert run(matrix, folder) == whole, "what is done is not planned again"
    return list(map(json.loads, whole.splitlines()))


@pytest.fixture
def of_size(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["case"]["size"] == "64x64"]


def test_each_cell_has_a_line_the_largest_budget_first(lines: list[Line]) -> None:
    budgets = ["1GiB", "60MiB", "6MiB", "2MiB", "1MiB"]
    found = [(line["case"]["size"], line["case"]["budget"]) for line in lines]
    assert found == [(size, budget) for size in ("64x64", "128x64") for budget in budgets]


def test_a_line_has_the_command_that_made_it(of_size: list[Line]) -> None:
    made = "python scripts/record_matrix.py --out DIR --only tiny-sd --limit 3"
    assert [line["command"] for line in of_size] == [made, None, made, made, None]


def test_a_plan_that_fits_a_smaller_budget_is_not_searched_for_there(of_size: list[Line]) -> None:
    more, less = of_size[:2]
    assert more["found"]["profile"]["measured"]["peak_bytes"] <= 60 * 2**20
    assert (less["found"], less["plan_s"]) == (None, 0)
    assert less["error"].startswith("60MiB: the plan for 1.00 GiB needs ")


def test_what_was_tried_is_known_to_the_next_budget(of_size: list[Line]) -> None:
    more, less = (of_size[n]["found"]["trials"] for n in (0, 2))
    assert more[0] in less
    assert of_size[2]["found"]["profile"]["measured"]["peak_bytes"] <= 6 * 2**20


def test_below_what_nothing_fits_nothing_is_tried(of_size: list[Line]) -> None:
    in_vain, skipped = of_size[3:]
    assert in_vain["found"] is skipped["found"] is None
    assert in_vain["smallest_bytes"] == skipped["smallest_bytes"] > 2 * 2**20
    assert in_vain["plan_s"] > skipped["plan_s"] == 0


@pytest.mark.slow
def test_a_later_run_knows_what_was_tried(matrix: Any, of_size: list[Line], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in of_size[:2]), "utf-8")
    resumed = list(map(json.loads, run(matrix, tmp_path).splitlines()))
    assert resumed[:2] == of_size[:2]
    assert resumed[2]["case"]["budget"] == "6MiB"
    assert of_size[0]["found"]["trials"][0]["plan"] in [
        trial["plan"] for trial in resumed[2]["found"]["trials"]
    ]


def test_no_cell_is_begun_that_would_not_be_done(matrix: Any, tmp_path: Path) -> None:
    assert run(matrix, tmp_path, "--deadline", "2") == ""


def test_the_size_that_most_use_comes_first(matrix: Any) -> None:
    columns = matrix.in_order(list(matrix.MODELS[:2]))
    assert [(column[0].model, column[0].size) for column in columns[:4]] == [
        ("sdxl", "1024x1024"), ("sd15", "512x512"), ("sdxl", "1536x1024"), ("sdxl", "768x768"),
    ]  # fmt: skip


def test_steps_are_the_model_s_own_but_where_an_image_takes_a_minute(matrix: Any) -> None:
    """What is asked for without steps is then measured for as it is asked."""
    own = {known.name: known.steps for known in ARCHITECTURES}
    cases = [case for model in matrix.MODELS for column in model.columns() for case in column]
    others = {(c.model, c.size, c.steps) for c in cases if c.steps != own[c.model]}
    assert others == {("sd15", "3840x2160", 20)}


def test_what_was_recorded_for_longer_is_done(matrix: Any) -> None:
    path = GOLDEN / "trials" / "sdxl--H100--8GiB--1024x1024-30steps.json.gz"
    made = matrix.Matrix("cuda:0", 25.0, math.inf, [matrix.golden_line(path)])
    column = matrix.MODELS[0].columns()[0]
    assert [case.budget for case in column if made.line(case)] == ["8GiB"]
    subject = SimpleNamespace(device=SimpleNamespace(name="NVIDIA H100 80GB HBM3"))
    known = matrix.recalled(made.lines[0], SimpleNamespace(subject=subject), path)
    assert len(known.attempts) == 7
    subject.device.name = "NVIDIA H200"
    assert matrix.recalled(made.lines[0], SimpleNamespace(subject=subject), path) is None


def test_a_golden_case_is_not_replaced(
    lines: list[Line], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    make = importlib.import_module("make_profiles")
    results = tmp_path / "lines"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    names = [make.name(line) for line in make.latest([results])]
    assert len(names) == len([line for line in lines if line["found"]]) >= 2
    monkeypatch.setattr(make, "GOLDEN", tmp_path)
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / f"{names[0]}.json.gz").touch()
    assert [make.name(line) for line in make.latest([results])] == names[1:]


def test_a_clearly_faster_plan_for_less_memory_is_shipped_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    make = importlib.import_module("make_profiles")
    (tmp_path / "trials").mkdir()
    for name in ("PROFILES", "GOLDEN"):
        monkeypatch.setattr(make, name, tmp_path)

    def shipped(**by_name: float) -> list[tuple[int, float]]:
        """Budgets in GiB and seconds, of profiles with these seconds."""
        for path in tmp_path.glob("*.yaml"):
            path.unlink()
        for name, image_s in by_name.items():
            made = samples.profile(measured=samples.measurement(image_s=image_s))
            budget = int(name.split("__")[1].removesuffix("GiB"))
            path = tmp_path / f"{name.replace('__', '--H100--')}--64x64-2steps.yaml"
            store.save(replace(made, budget_bytes=budget * GIB), path)
        make.take_over()
        found = map(store.load, sorted(tmp_path.glob("*.yaml")))
        return [(profile.budget_bytes // GIB, profile.measured.image_s) for profile in found]

    assert shipped(sd__8GiB=1.0, sd__6GiB=0.98) == [(6, 0.98), (8, 0.98)]
    assert shipped(sd__8GiB=1.0, sd__4GiB=0.98, sd__6GiB=0.97)[-1] == (8, 0.97)
    assert shipped(sd__8GiB=1.0, sd__6GiB=0.99) == [(6, 0.99), (8, 1.0)]
    assert shipped(sd__6GiB=1.0, sd__8GiB=0.9) == [(6, 1.0), (8, 0.9)]
    assert shipped(sd__8GiB=1.0, xl__6GiB=0.9) == [(8, 1.0), (6, 0.9)]
    (tmp_path / "trials" / "sd--H100--8GiB--64x64-2steps.json.gz").touch()
    assert shipped(sd__8GiB=1.0, sd__6GiB=0.98) == [(6, 0.98), (8, 1.0)]


def test_profiles_are_shipped_and_shown(
    lines: list[Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert len(list(profiles.glob("*.yaml"))) == len([line for line in lines if line["found"]])
    assert sorted(json.loads((profiles / "too_small.json").read_text("utf-8"))) == [
        "tiny-sd--128x64-2steps",
        "tiny-sd--64x64-2steps",
    ]
    text = readme.read_text("utf-8")
    assert "| model, size, steps | card | 0.00585938 GiB | 1 GiB | smallest |" in text
    assert text.count("| tiny-sd ") == 2
    monkeypatch.setattr(sys, "argv", ["make_profiles.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        make.main()
    assert ended.value.code == 0
