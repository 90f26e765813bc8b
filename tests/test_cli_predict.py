"""`autofit plan` without trials: predictions by dry run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import autofit

from autofit import session
from autofit.architectures import build
from autofit.dryrun import memo
from autofit.spec import BadInput

TINY = ("plan", "tiny-sd", "--size", "64x64", "--steps", "4", "--gpu", "rtx-4060")


def test_says_what_fits_and_how_fast() -> None:
    ended = autofit(*TINY, "--budget", "1GB", "--dry-run")
    assert ended.code == 0, ended.err
    assert "StableDiffusionPipeline, 64x64, 4 steps" in ended.out
    assert "not measured" in ended.out
    assert "NVIDIA GeForce RTX 4060" in ended.out


def test_the_budget_is_the_card_s_where_none_is_given() -> None:
    ended = autofit(*TINY, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert 6e9 < found["budget_bytes"] < 8e9
    keys = "schema pipeline workload budget_bytes plan predicted smallest_bytes on"
    assert list(found) == keys.split()
    predicted = found["predicted"]
    assert {"peak_bytes", "image_s", "limit_s"} <= set(predicted)
    assert 0 < predicted["limit_s"] <= predicted["image_s"]
    least_s, most_s = predicted["image_s_band"]
    assert (least_s + most_s) / 2 == pytest.approx(predicted["image_s"])
    assert predicted["peak_band"] == 0.1
    assert predicted["peak_bytes"] <= found["budget_bytes"]


def test_no_budget_is_above_the_card_s_memory() -> None:
    """Else a plan would be said to fit that no such card can hold."""
    ended = autofit(*TINY, "--budget", "1TB", "--json")
    assert ended.err.count("\n") == 1
    assert "is above the 7.64 GiB of NVIDIA GeForce RTX 4060" in ended.err
    found = json.loads(ended.out)
    assert found["budget_bytes"] == found["on"]["total_bytes"] < 9e9


def test_a_table_for_budgets_and_sizes() -> None:
    asked = ("--budgets", "1MB,1GB,8GB", "--sizes", "64x64,96x64")
    model = ("plan", "tiny-sd", "--steps", "4", "--gpu", "rtx-4060")
    ended = autofit(*model, *asked)
    assert ended.code == 0, ended.err
    rows = ended.out.splitlines()[2:]
    assert len(rows) == 6
    assert all("does not fit: the smallest plan needs" in row for row in (rows[0], rows[3]))
    assert sum("96x64" in row for row in rows) == 3
    found = json.loads(autofit(*model, *asked, "--json").out)
    assert [cell["predicted"] is None for cell in found] == [True, False, False] * 2


def test_a_prediction_is_not_taken_for_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    ended = autofit(*TINY, "--budget", "1GB", "--output", str(path))
    assert ended.code == 0, ended.err
    shown = autofit("show", str(path))
    assert shown.code == 2
    assert "a prediction, which nothing measured" in shown.err
    with pytest.raises(BadInput, match="a prediction"):
        session.apply(build("tiny-sd"), profile=path, device="cpu")


def test_the_budget_that_an_error_suggests_is_enough() -> None:
    refused = autofit(*TINY, "--budget", "1MB")
    assert refused.code == 3
    suggested = re.search(r"try --budget (\d+MB)", refused.err)
    assert suggested is not None
    ended = autofit(*TINY, "--budget", suggested[1])
    assert ended.code == 0, ended.err


SECOND = """
import sys, time
start = time.perf_counter()
from autofit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "diffusers", "transformers", "accelerate", "optuna"} & set(sys.modules)
print(time.perf_counter() - start, *heavy, file=sys.stderr)
"""


def test_a_model_seen_before_takes_no_torch_and_no_time() -> None:
    arguments = (*TINY, "--budget", "1GB")
    memo.forget()  # what an earlier test saw is in another folder, perhaps
    first = autofit(*arguments)
    assert first.code == 0, first.err
    command = [sys.executable, "-c", SECOND, *arguments]
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == first.out
    took_s, *heavy = second.stderr.split()
    assert heavy == []
    assert float(took_s) < 3  # 0.5 where the processor is free


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*TINY, "--budget", "1MB"), 3, "no plan is predicted to fit"),
        ((*TINY[:-1], "rtx-4061"), 2, "Did you mean rtx-4060"),
        ((*TINY, "--budget", "1GB", "--budgets", "1GB"), 2, "--budget or --budgets, not both"),
        ((*TINY, "--budgets", "1GB,8"), 2, "8GiB"),
        ((*TINY, "--budgets", "1GB,,2GB"), 2, "budget '': not a number with a unit"),
        ((*TINY, "--budget", ""), 2, "budget '': not a number with a unit"),
        ((*TINY, "--device", "cpu"), 2, "gpu 'rtx-4060' is predicted, not used"),
        ((*TINY, "--images", "-3"), 2, "images -3 is below 1"),
        (("plan", "tiny-sd", "--dry-run", "--device", "cpu"), 2, "--gpu rtx-4060"),
        (("plan", "tiny-sd", "--device", "cpu"), 2, "give one, as --budget 8GB"),
        (("plan", "no-such-model", "--gpu", "rtx-4060"), 2, "no-such-model"),
        ((*TINY[:3], "65x64", *TINY[4:]), 2, "the nearest is 64x64"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    ended = autofit(*arguments)
    assert ended.code == code
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
