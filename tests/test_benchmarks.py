"""The benchmark: contenders that succeed, fail and hang, or cannot fit, are all lines."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import samples

from autofit import probe, store
from autofit.architectures import build
from autofit.spec import Plan, Workload
from autofit.techniques.streamed import Streamed

SCRIPTS = Path(__file__).parent.parent / "scripts"
NEEDED = {
    "model", "size", "batch", "steps", "budget_bytes", "contender", "image_s", "step_s",
    "peak_bytes", "limit_s", "gpu", "versions", "command", "encode_s", "decode_s", "setup_s",
    "runs_s", "dtype", "plan", "error", "stages_s",
}  # fmt: skip
CASE = "tiny-sd-64x64-1GiB"
FLOOR = {
    "encode_s": 0.5, "step_s": 1.0, "decode_s": 0.25, "pinned_bytes_s": 10.0, "outside_bytes": 5,
    "weight_bytes": {"encoder": 20, "denoiser": 100, "vae": 1},
    "activation_bytes": {"encode": 1, "step": 15, "decode": 9},
}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("bench_peers")


def run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    called(out, *arguments)
    return read(out / "results.jsonl")


def called(out: Path, *arguments: str) -> str:
    command = [sys.executable, SCRIPTS / "bench_peers.py", "--out", out, "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], env=env, check=True, timeout=240, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_contenders_that_run_and_one_that_cannot_are_lines(tmp_path: Path) -> None:
    asked = ("--only", CASE, "--contenders", "autofit,diffusers-group-leaf", "--search", "5",
             "--plans", str(tmp_path / "plans"))  # fmt: skip
    floor, ours, streams = lines = run(tmp_path, *asked)
    assert [line["contender"] for line in lines] == ["floor", "autofit", "diffusers-group-leaf"]
    assert all(line.keys() >= NEEDED for line in lines)
    assert [line["budget_bytes"] for line in lines] == [None, 2**30, 2**30]
    assert floor["error"] is None
    assert ours["error"] is None
    assert ours["image_crc32"] == floor["image_crc32"]
    assert ours["image_s"] == pytest.approx(sum(ours["runs_s"]) / 2)
    assert ours["encode_s"] + 4 * ours["step_s"] + ours["decode_s"] <= 1.5 * ours["image_s"]
    assert 5_000_000 < ours["peak_bytes"] <= ours["budget_bytes"]
    assert ours["within_budget"]
    assert ours["plan"] == "resident"
    assert ours["streamed_bytes"] == 0
    assert ours["limit_s"] == pytest.approx(
        floor["encode_s"] + 4 * floor["step_s"] + floor["decode_s"]
    )
    stages_s = ours["stages_s"]
    assert list(stages_s) == ["device", "pipe", "prepare", "warmup", "runs"]
    assert stages_s["runs"] == pytest.approx(sum(ours["runs_s"]), rel=0.1)
    assert ours["setup_s"] == pytest.approx(stages_s["prepare"] + stages_s["warmup"])
    assert ours["planned"]
    saved = store.load(tmp_path / "plans" / f"{CASE}-autofit.yaml")
    assert (saved.plan.label, saved.budget_bytes) == ("resident", 2**30)
    assert "streams" in streams["error"]
    assert list(streams["stages_s"]) == ["device", "pipe"], "it failed after these"
    assert streams["image_s"] is None
    assert streams["gpu"] == floor["gpu"]
    assert run(tmp_path, *asked, "--limit", "0.01") == lines, "what has a line is not run again"


@pytest.mark.slow
def test_a_plan_that_is_there_is_not_searched_for_again(tmp_path: Path) -> None:
    plan = Plan((Streamed(weights_bytes=2_000_000),))
    known = samples.profile(
        plan=plan,
        fingerprint=probe.fingerprint(build("tiny-sd")),
        workload=Workload(64, 64, 4, passes=2),  # whole generations of it verify the plan here
    )
    store.save(known, tmp_path / f"{CASE}-autofit.yaml")
    asked = ("--only", CASE, "--contenders", "autofit", "--plans", str(tmp_path))
    floor, ours = run(tmp_path, *asked)
    assert ours["error"] is None
    assert (ours["planned"], ours["plan"], ours["trials"]) == (False, plan.label, [])
    assert ours["image_crc32"] == floor["image_crc32"]
    assert ours["weights_bytes"] == 2_000_000
    assert 0 < ours["streamed_bytes"] < 4 * floor["weight_bytes"]["denoiser"]


@pytest.mark.slow
def test_the_ladder_is_climbed_by_one_command(tmp_path: Path, bench: Any) -> None:
    """Autofit's plan comes last."""
    lines = run(tmp_path, "--only", "tiny-sd-64x64-2GiB", "--search", "1")
    contenders = ("floor", *bench.LADDER, "autofit-numeric")
    assert tuple(line["contender"] for line in lines) == contenders
    assert all(line["error"] is None for line in lines)


def test_each_rung_of_the_ladder_has_what_is_above_it(bench: Any) -> None:
    rungs = [rung.techniques for rung in bench.LADDER.values()]
    assert rungs[0] == ()
    for lower, higher in pairwise(rungs):
        assert higher[:-1] == lower
    assert [r[-1].name for r in rungs[1:]] == [
        "half_precision", "channels_last_denoiser", "traced", "sdpa",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_rung_is_a_line(tmp_path: Path) -> None:
    """The lowest and the highest: attention is plain up to the last."""
    names = ("ladder-original", "ladder-efficient-attention")
    asked = ("--only", "tiny-sd-64x64-2GiB", "--contenders", ",".join(names))
    floor, original, last = run(tmp_path, *asked)
    assert all(line["error"] is None and line.keys() >= NEEDED for line in (original, last))
    assert original["plan"] == "resident, plain attention"
    assert last["plan"].endswith(" + traced + sdpa(kernel=efficient) + resident")
    assert original["image_mean"] == pytest.approx(floor["image_mean"], abs=1e-3)
    assert original["image_crc32"] != floor["image_crc32"], "plain attention rounds otherwise"
    assert last["image_crc32"] != original["image_crc32"]
    assert last["peak_bytes"] < original["peak_bytes"]


@pytest.mark.slow
def test_a_child_that_hangs_is_killed_and_a_line(tmp_path: Path) -> None:
    asked = ("--only", "tiny-flux-64x64-1GiB", "--contenders", "diffusers-resident")
    lines = run(tmp_path, *asked, "--limit", "0.01")
    assert [line["contender"] for line in lines] == ["floor", "diffusers-resident"]
    assert all(line["error"].startswith("no answer in 0.01 s: killed") for line in lines)
    assert all(line.keys() >= NEEDED for line in lines)


def test_no_child_starts_after_the_deadline(tmp_path: Path) -> None:
    said = called(tmp_path, "--only", CASE, "--contenders", "autofit", "--deadline", "-1")
    assert said == f"left, 2: {CASE} floor, {CASE} autofit\n"
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("contender", "budget_bytes", "runs"),
    [
        ("diffusers-resident", 126, True),  # 121 of weights beside 5
        ("diffusers-resident", 125, False),
        ("diffusers-model-offload", 105, True),
        ("diffusers-model-offload", 104, False),
        ("autofit", 1, True),
    ],
)
def test_what_cannot_fit_is_not_run(
    bench: Any, contender: str, budget_bytes: int, runs: bool
) -> None:
    asked = {"contender": contender, "budget_bytes": budget_bytes}
    assert (bench.why_not(asked, FLOOR) is None) is runs
    assert bench.why_not(asked, {}) is None, "without a floor nothing is known"


def test_what_is_not_run_is_a_line(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "children", None)
    floor = {"weight_bytes": {"encoder": 2**20, "denoiser": 2**21, "vae": 1}, "gpu": "G"}
    options = bench.Options("cuda:0", 1.0, 1.0, None)
    line = bench.tuned(bench.TINY[2], "diffusers-model-offload", floor, options)
    assert line.keys() >= NEEDED
    assert line["error"] == (
        "not run: its weights and CUDA's context are 2.00 MiB, the budget is 1.00 MiB"
    )
    assert (line["out_of_memory"], line["image_s"], line["gpu"]) == (True, None, "G")


@pytest.mark.parametrize(
    ("contender", "answers", "tries"),
    [
        ("mmgp", [{"out_of_memory": True, "error": "full"}] * 2 + [{"error": "else"}], 3),
        ("mmgp", [{"out_of_memory": True, "error": "full"}] * 3, 3),
        ("mmgp", [{"error": "else"}], 1),
        ("diffusers-resident", [{"out_of_memory": True, "error": "full"}], 1),
    ],
)
def test_only_who_is_told_bytes_is_told_fewer(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    contender: str,
    answers: list[dict[str, Any]],
    tries: int,
) -> None:
    told: list[dict[str, Any]] = []
    left = iter(answers)

    class Children:
        def run(self, spec: dict[str, Any], limit_s: float) -> dict[str, Any]:
            told.append(spec)
            return next(left)

    monkeypatch.setattr(bench, "children", Children)
    line = bench.tuned(bench.TINY[0], contender, {}, bench.Options("cpu", 1.0, 1.0, None))
    assert [spec["attempt"] for spec in told] == list(range(1, tries + 1))
    assert line["attempt"] == tries
    assert line["error"] == answers[-1]["error"]
    assert line["limit_s"] is None


@pytest.mark.parametrize(
    ("budget_bytes", "streamed", "late", "limit_s"),
    [
        (140, 0, 0, 0.5 + 4 * 1.0 + 0.25),  # all fits: 120 of weights beside 5 and 15
        (130, 0, 0, 0.5 + 4 * 1.0 + 0.25),  # ten a step come unseen, in place of which encoders fit
        (121, 0, 9, 0.9 + 4 * 1.0 + 0.25),
        (100, 20, 20, 2.0 + 4 * 2.0 + 0.25),  # the step waits for the bus
        (10, 100, 20, 2.0 + 4 * 10.0 + 0.25),  # not even the activations fit
    ],
)
def test_the_limit_is_compute_or_the_bus(
    bench: Any, budget_bytes: int, streamed: int, late: int, limit_s: float
) -> None:
    found = bench.limits({"budget_bytes": budget_bytes, "steps": 4}, FLOOR)
    assert found["limit"]["streamed_bytes"] == streamed
    assert found["limit"]["encoder_streamed_bytes"] == late
    assert found["limit_s"] == pytest.approx(limit_s)


@pytest.mark.slow
def test_a_benchmark_that_is_ended_ends_its_child(tmp_path: Path) -> None:
    """Which holds a card and a model's weights in page-locked memory."""
    command = [sys.executable, SCRIPTS / "bench_peers.py", "--out", tmp_path, "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("== tiny-sd: built"))
        until = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < until
            time.sleep(0.01)
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143
    assert not any(child.is_running() for child in children)
