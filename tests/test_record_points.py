"""Points set beside predictions: what fails is a line, what is there is not measured again."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import samples

from autofit import session
from autofit.dryrun import DryRun
from autofit.spec import AutofitError, Failure, Measurement, Outcome, Phase, Why
from autofit.trial import Request
from autofit.trial.measurer import Subject

SCRIPTS = Path(__file__).parent.parent / "scripts"
SD, FLUX = "tiny-sd-64x64", "tiny-flux-64x64-b2"
DECODE_S, STEPS_S = 0.25, (1.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("record_points")
    sys.path.remove(str(SCRIPTS))


class FakeWorker:
    """Answers at once; one plan crashes."""

    def __init__(self, model: str) -> None:
        self.subject = Subject(DryRun(model).pipeline, samples.device())
        self.asked: list[Request] = []

    def measure(self, request: Request) -> Outcome:
        self.asked.append(request)
        if request.plan.placement.name == "model_offload":
            return Failure(Why.CRASH, "worker ended by SIGSEGV")
        return samples.measurement(
            encode_s=0.5, step_s=STEPS_S, decode_s=DECODE_S, runs_s=(), verified=False
        )


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeWorker]:
    """Those that were started, by their model. FLUX's starts only once it is told to."""
    started: dict[str, FakeWorker] = {}

    @contextmanager
    def measuring(model: str, device: str) -> Iterator[FakeWorker]:
        if model == "tiny-flux" and "refused" not in started:
            started["refused"] = FakeWorker("tiny-sd")
            raise AutofitError("the worker for tiny-flux did not start")
        yield started.setdefault(model, FakeWorker(model))

    monkeypatch.setattr(session, "measuring", measuring)
    return started


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in results.read_text().splitlines()]


def test_a_crash_is_a_line_and_the_rest_goes_on(
    script: Any, workers: dict[str, FakeWorker], tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    script.record(list(script.TINY), "cuda:0", 1e6, results)
    lines = {line["point"]: line for line in lines_of(results)}
    assert set(lines) == {f"{SD}/{place}" for place in script.ALL}  # of FLUX no worker started
    crashed = lines.pop(f"{SD}/model")
    assert (crashed["measured"], crashed["failure"]["why"]) == (None, "crash")
    for line in lines.values():
        assert line["failure"] is None
        assert line["predicted"]["peak_bytes"] > 0
        assert line["predicted_dry"]["peak_bytes"] > 0  # samples.device() is in the table
        assert line["image_s"] == 0.5 + 1.0 + (line["workload"]["steps"] - 1) * 0.5 + DECODE_S
    assert all(r.workload.steps <= script.TINY[0].steps for r in workers["tiny-sd"].asked)


def test_what_is_there_is_not_measured_again(
    script: Any, workers: dict[str, FakeWorker], tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    script.record([script.TINY[0]], "cuda:0", 1e6, results)
    kept = results.read_text().splitlines(keepends=True)
    results.write_text("".join(kept[:5]) + kept[5][:40] + "\n")  # cut short
    workers["tiny-sd"].asked.clear()
    script.record(list(script.TINY), "cuda:0", 1e6, results)
    assert len(workers["tiny-sd"].asked) == len(kept) - 5
    points = [line["point"] for line in script.read(results)]
    assert len(points) == len(set(points)) == len(kept)
    script.record(list(script.TINY), "cuda:0", 1e6, results)
    assert len(workers["tiny-flux"].asked) == len(script.TINY[1].places)


def test_models_share_the_time(
    script: Any,
    workers: dict[str, FakeWorker],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script.record(list(script.TINY), "cuda:0", -1.0, tmp_path / "results.jsonl")
    assert "left: tiny-sd" in capsys.readouterr().out
    assert workers == {}
    assert not (tmp_path / "results.jsonl").exists()


def test_the_cases_fit_their_call(script: Any) -> None:
    """Sixty points in eight minutes, of the placements, sizes and batches that matter."""
    cases = script.CASES
    assert sum(len(case.places) for case in cases) >= 60
    models = {case.model: [c for c in cases if c.model == case.model] for case in cases}
    assert sum(script.expected_s(group, set()) for group in models.values()) <= 500
    assert {place for case in cases for place in case.places} == set(script.ALL)
    assert {case.batch for case in cases} >= {1, 2, 4, 8}
    assert all(len(case.places) >= 3 for case in cases)


# ---------------------------------------------------------------- what it comes to


def line(script: Any, *, peak: float = 0.0, seconds: float = 1.0, said_s: float = 1.0) -> Any:
    """A point whose peak was predicted so much too high."""
    phase_s = {phase.value: said_s / 4 for phase in Phase}
    predicted = {"peak_bytes": 1000 * (1 + peak), "image_s": said_s, "phase_s": phase_s}
    measured = {"peak_bytes": 1000, "encode_s": 0.25, "step_s": [1.0, 0.25], "decode_s": 0.25}
    return {
        "point": "a/b", "case": "a", "image_s": seconds, "measured": measured,
        "predicted": predicted, "predicted_dry": predicted,
    }  # fmt: skip


def met(script: Any, lines: list[Any]) -> list[bool]:
    return [is_met for _, is_met in script.bars(lines)]


def test_bars_that_are_met(script: Any) -> None:
    lines = [line(script, peak=0.04, seconds=s, said_s=1.2 * s) for s in (1.0, 2.0, 3.0, 4.0)]
    assert met(script, lines) == [True] * 5


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"peak": 0.06}, 0),
        ({"peak": -0.04}, 1),
        ({"peak": 0.2}, 2),
        ({"said_s": 0.6}, 3),
    ],
)
def test_bars_that_are_missed(script: Any, changed: dict[str, float], missed: int) -> None:
    assert not met(script, [line(script, **changed)] * 3)[missed]


def test_a_reversed_order_is_missed(script: Any) -> None:
    lines = [line(script, seconds=s, said_s=5 - s) for s in (1.0, 2.0, 3.0, 4.0)]
    assert not met(script, lines)[-1]


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([4, 3, 2, 1], [10, 20, 30, 40], -1.0),
        ([1, 1, 2, 2], [1, 2, 3, 4], 0.894427),
        ([1, 1, 1, 1], [1, 2, 3, 4], 0.0),
    ],
)
def test_rank_correlation(
    script: Any, said: list[float], true: list[float], expected: float
) -> None:
    assert script.spearman(said, true) == pytest.approx(expected)


def test_the_95th_percentile_leaves_one_in_twenty_out(script: Any) -> None:
    assert script.percentile_95(range(1, 21)) == 19
    assert script.percentile_95([3.0]) == 3.0


def test_steps_of_a_trial_make_an_image(script: Any) -> None:
    measured: Measurement = samples.measurement(encode_s=1.0, step_s=(3.0, 2.0, 2.5), decode_s=1.0)
    assert script.whole_s(measured, 10) == 1.0 + 3.0 + 9 * 2.25 + 1.0
