from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import samples
from rich.console import Console
from rich.table import Table

from autofit import report, tables
from autofit.plain import document
from autofit.spec import Attempt, Environment, Failure, Outcome, Phase, Plan, Why, Workload
from autofit.techniques import KINDS

BUDGET = 4 * samples.GIB
EAGER = "UNet runs eagerly, not as a CUDA graph: unet.py:12 waits for the device"
OUT_OF_MEMORY = Failure(Why.OUT_OF_MEMORY, "CUDA out of memory", Phase.DECODE, 9_771_050_598)


def rendered(table: Table) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    return text.getvalue().splitlines()


def rows(attempts: list[Attempt], best: Plan | None = samples.FAST) -> list[list[str]]:
    lines = rendered(tables.trials_table(attempts, best, BUDGET))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return [row for row in cells if row]


def result(outcome: Outcome, plan: Plan = samples.SLOW) -> str:
    """What the table says of a trial beside a best one of 0.865 s."""
    best = Attempt(samples.FAST, samples.measurement())
    return next(row[-1] for row in rows([best, Attempt(plan, outcome)]) if row[0] == "2")


# ---------------------------------------------------------------- when a plan's set-up pays


def trial(plan: Plan, image_s: float, warmup_s: float, peak_bytes: int = 10**9) -> Attempt:
    return Attempt(
        plan, samples.measurement(image_s=image_s, warmup_s=warmup_s, peak_bytes=peak_bytes)
    )


def pays(*attempts: Attempt, image_s: float = 1.0, setup_s: float = 24.0) -> Any:
    measured = samples.measurement(image_s=image_s, warmup_s=setup_s)
    return report.break_even(samples.profile(measured=measured), attempts)


SLICED = Plan((KINDS["sliced_vae"](), samples.RESIDENT))


def test_a_set_up_pays_from_the_first_image_that_is_sooner_done() -> None:
    found = pays(trial(samples.SLOW, 1.4, 0.0))
    assert found == report.BreakEven(61, 24.0, "model_offload", 0.0, 1.4)
    for images in (60, 61):
        assert (24.0 + images * 1.0 < images * 1.4) is (images == 61)


def test_a_set_up_has_paid_when_no_plan_with_clearly_less_of_it_is_ahead() -> None:
    early, late = trial(samples.SLOW, 3.0, 0.5), trial(SLICED, 1.25, 4.0)
    compiled_too = trial(Plan((KINDS["sdpa"]("math"), samples.RESIDENT)), 1.01, 20.0)
    assert pays(early, late, compiled_too) == pays(late)
    assert pays(late) == report.BreakEven(81, 24.0, "sliced_vae + resident", 4.0, 1.25)


def test_short_trials_are_compared_with_short_trials() -> None:
    """A whole generation takes somewhat longer than a short trial says."""
    own, other = trial(samples.FAST, 1.0, 30.0), trial(samples.SLOW, 1.4, 0.0)
    assert pays(other, own, image_s=1.2) == pays(other)


@pytest.mark.parametrize(
    "attempts",
    [
        [],
        [trial(samples.FAST, 1.1, 0.1)],  # itself
        [Attempt(samples.SLOW, OUT_OF_MEMORY)],
        [trial(samples.SLOW, 1.4, 0.0, peak_bytes=5 * samples.GIB)],  # over the budget
        [trial(samples.SLOW, 0.9, 0.0)],  # it did not pass where it was verified
        [trial(samples.SLOW, 30.0, 1.0)],  # with the first image
    ],
    ids=["none", "itself", "failed", "over budget", "faster", "at once"],
)
def test_nothing_is_said_of_a_set_up_without_a_plan_to_compare_with(
    attempts: list[Attempt],
) -> None:
    assert pays(*attempts) is None
    assert report.why_json(attempts, [])["break_even"] is None


def test_when_a_set_up_pays_is_said_beside_it() -> None:
    found = pays(trial(samples.SLOW, 1.4, 0.125))
    data = json.loads(json.dumps(report.why_json([], [], pays=found)["break_even"]))
    profile = samples.profile(measured=samples.measurement(warmup_s=24.0))
    lines = report.profile_lines(profile, pays=data).splitlines()
    assert lines[lines.index("set-up    24 s: pays from 60 images on against") + 1] == (
        "          model_offload (set-up 0.125 s)"
    )
    several = samples.profile(workload=Workload(512, 512, 50, batch=4))
    assert "pays from 60 generations on" in report.profile_lines(several, pays=data)


# ---------------------------------------------------------------- one profile


def test_a_profile_says_what_it_does_and_costs() -> None:
    assert report.profile_lines(samples.profile()).splitlines() == [
        "pipeline  StableDiffusionPipeline, 512x512, 50 steps, with guidance",
        "plan      half_precision(dtype=float16)",
        "          tiled_vae(tile_px=512, overlap=0.25)",
        "          resident",
        "peak      3.42 GiB of 4.00 GiB (85%)",
        "time      0.865 s a generation: encode 12.1 ms, 16.5 ms a step, decode 41.2 ms",
        "set-up    4.75 s",
        "output    lossy, PSNR 41.2 dB against resident",
        "measured  in whole generations: 0.865 s, 0.865 s",
        "on        NVIDIA H200, 139.80 GiB, capability 9.0",
        "          budget emulated: the allocator was capped, the card is larger",
        "versions  python 3.12.3, torch 2.11.0+cu130, diffusers 0.42.1, transformers 5.17.0,"
        " accelerate 1.15.0, cuda 13.0, driver 580.95.05",
    ]


def test_how_near_a_profile_comes_to_the_limit_is_said_where_it_is_known() -> None:
    lines = report.profile_lines(samples.profile(), 0.7).splitlines()
    assert lines[5].startswith("time      0.865 s")
    assert lines[6] == "          at least 81% of what this device can do within the budget"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"measured": samples.measurement(psnr_db=None)},
            "output    lossy, not compared",
        ),
        (
            {"measured": samples.measurement(psnr_db=math.inf, reference=None)},
            "output    lossy, the same values as the pipe as found",
        ),
        (
            {"measured": samples.measurement(seam_psnr_db=38.25)},
            "          its seams 38.2 dB from an untiled decode",
        ),
        ({"measured": samples.measurement(fallbacks=(EAGER,))}, f"fallback  {EAGER}"),
        (
            {"measured": samples.measurement(verified=False, steps_run=3)},
            "measured  in a short trial of 3 steps; the time is extrapolated",
        ),
        (
            {"workload": Workload(640, 480, 4, batch=2, frames=9)},
            "pipeline  StableDiffusionPipeline, 640x480, 4 steps, batch 2, 9 frames",
        ),
        (
            {
                "workload": Workload(640, 480, 4, batch=2),
                "measured": samples.measurement(step_s=()),
            },
            "time      0.865 s a generation (0.433 s an image): encode 12.1 ms, decode 41.2 ms",
        ),
        (
            {"on": Environment("AMD EPYC", None, 2**34, "tracked", {})},
            "on        AMD EPYC, 16.00 GiB",
        ),
        (
            {"on": Environment("AMD EPYC", None, 2**34, "tracked", {})},
            "          CPU: the peak is that of live tensors",
        ),
        ({"on": Environment("AMD EPYC", None, 2**34, "tracked", {})}, "versions  unknown"),
        (
            {"on": Environment("RTX 4090", (8, 9), 24 * 2**30, "card", {})},
            "          budget of the card itself",
        ),
    ],
)
def test_a_profile_says_what_is_special(changes: dict[str, Any], line: str) -> None:
    assert line in report.profile_lines(samples.profile(**changes)).splitlines()


def test_sizes_in_a_plan_are_shown_in_units() -> None:
    plan = Plan((KINDS["streamed"](7_730_941_133),))
    assert plan.label == "streamed(weights_bytes=7730941133)"
    lines = report.profile_lines(samples.profile(plan=plan)).splitlines()
    assert lines[1] == "plan      streamed(weights=7.20 GiB)"
    assert rows([Attempt(plan, samples.measurement())])[0][1] == "streamed(weights=7.20 GiB)"
    (trial,) = report.trials_json([Attempt(plan, samples.measurement())])
    assert trial["plan"] == [
        {
            "technique": "streamed",
            "weights_bytes": 7_730_941_133,
            "unit_bytes": None,
            "borrows": False,
            "borrowed_bytes": None,
            "from_files": False,
        }
    ]


# ---------------------------------------------------------------- trials


def test_trials_are_ranked_best_first_failures_last() -> None:
    attempts = [
        Attempt(samples.SLOW, OUT_OF_MEMORY),
        Attempt(samples.SLOW, samples.measurement(image_s=2.0, psnr_db=None)),
        Attempt(samples.FAST, samples.measurement(image_s=0.9, verified=False)),
        Attempt(samples.FAST, samples.measurement(image_s=1.0)),
    ]
    plan = "half_precision + tiled_vae(tile_px=512, overlap=0.25) + resident"
    assert rows(attempts) == [
        ["4", plan, "1 s", "3.42 GiB", "41.2 dB", "best"],
        ["3", plan, "0.9 s", "3.42 GiB", "41.2 dB", "same plan as the best"],
        ["2", "model_offload", "2 s", "3.42 GiB", "exact", "slower than the best by 100%"],
        ["1", "model_offload", "", "", "", "out of memory in decode, needed 9.10 GiB"],
    ]


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (OUT_OF_MEMORY, "out of memory in decode, needed 9.10 GiB"),
        (Failure(Why.OVER_BUDGET, "", None, 5 * samples.GIB), "over budget, needed 5.00 GiB"),
        (Failure(Why.TOO_SLOW, "4 steps at 0.2 s"), "cannot win"),
        (Failure(Why.HANG, "no answer in 90 s", Phase.STEP), "hang in step: no answer in 90 s"),
        (
            Failure(Why.ERROR, "\nTypeError: bad operand [/red]\n  at x"),
            "error: TypeError: bad operand [/red]",
        ),
        (samples.measurement(image_s=0.969), "slower than the best by 12%"),
        (samples.measurement(image_s=0.869), "slower than the best by 0.43%"),
        (samples.measurement(image_s=0.8), "faster, but not chosen"),
        (
            samples.measurement(image_s=0.969, fallbacks=("eager: it waits",)),
            "slower than the best by 12%; eager: it waits",
        ),
        (samples.measurement(image_s=0.8, verified=False), "faster, in a short trial only"),
        (
            samples.measurement(image_s=0.5, peak_bytes=BUDGET + 2**30),
            "over the budget by 1.00 GiB",
        ),
    ],
)
def test_a_loser_says_why(outcome: Outcome, text: str) -> None:
    assert result(outcome) == text


def test_without_a_best_there_is_none_marked() -> None:
    attempts = [Attempt(samples.SLOW, samples.measurement()), Attempt(samples.FAST, OUT_OF_MEMORY)]
    assert [row[-1] for row in rows(attempts, best=None)] == [
        "",
        "out of memory in decode, needed 9.10 GiB",
    ]


@pytest.mark.parametrize(
    ("plan", "psnr_db", "text"),
    [
        (samples.SLOW, None, "exact"),
        (samples.SLOW, math.inf, "exact"),
        (samples.SLOW, 71.26, "71.3 dB"),
        (samples.FAST, None, ""),
        (samples.FAST, 41.25, "41.2 dB"),
    ],
)
def test_the_output_is_compared_or_exact(plan: Plan, psnr_db: float | None, text: str) -> None:
    assert rows([Attempt(plan, samples.measurement(psnr_db=psnr_db))])[0][4] == text


def test_no_trials_make_an_empty_table() -> None:
    table = tables.trials_table([], None, BUDGET)
    assert table.row_count == 0
    assert table.title == "0 trials within 4.00 GiB"


# ---------------------------------------------------------------- a device


def test_a_device_is_shown_with_its_rates() -> None:
    text = "\n".join(rendered(tables.device_table(samples.device())))
    for part in (
        "NVIDIA H200",
        "139.80 GiB",
        "9.0",
        "51.22 GiB/s",
        "710 TFLOP/s",
        "45 us",
        "float16 at head size 40, 80",
        "580.95.05",
    ):
        assert part in text


def test_a_processor_has_no_transfer_rates() -> None:
    cpu = samples.device(kind="cpu", name="EPYC [x16]", capability=None, context_bytes=0)
    text = "\n".join(rendered(tables.device_table(cpu)))
    assert "EPYC [x16]" in text
    assert not any(word in text for word in ("pinned", "capability", "context"))


# ---------------------------------------------------------------- for programs


def test_json_has_the_keys_of_the_file() -> None:
    assert json.loads(report.profile_json(samples.profile())) == document(samples.profile())


def test_json_without_infinity() -> None:
    profile = samples.profile(measured=samples.measurement(psnr_db=math.inf))
    data = json.loads(report.profile_json(profile), parse_constant=pytest.fail)
    assert data["measured"]["psnr_db"] == "Infinity"


def test_trials_as_plain_data() -> None:
    measured = samples.measurement(psnr_db=math.inf)
    data = report.trials_json(
        [Attempt(samples.FAST, measured), Attempt(samples.SLOW, OUT_OF_MEMORY)]
    )
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [row["number"] for row in data] == [1, 2]
    assert data[0]["plan"][0] == {"technique": "half_precision", "dtype": "float16"}
    assert data[0]["measured"]["psnr_db"] == "Infinity"
    assert (data[0]["fidelity"], data[0]["failure"]) == ("lossy", None)
    assert data[1]["measured"] is None
    assert data[1]["failure"] == {
        "why": "out of memory",
        "detail": "CUDA out of memory",
        "phase": "decode",
        "needed_bytes": 9_771_050_598,
        "step_s": None,
    }


def test_why_tells_of_each_trial_what_it_was_done_without() -> None:
    eager = Attempt(samples.FAST, samples.measurement(fallbacks=(EAGER,)))
    why = report.why_json([eager, Attempt(samples.SLOW, samples.measurement())], [])
    del why["trials"][1]["measured"]["fallbacks"]  # as an earlier autofit kept it
    _, first, second, _ = report.why_lines(why).splitlines()
    assert first.endswith(f" resident: 0.865 s, 3.42 GiB; {EAGER}")
    assert second == "  model_offload: 0.865 s, 3.42 GiB"


def test_a_peak_so_tight_that_kernels_are_slower_is_said() -> None:
    def lines(starved: int) -> str:
        measured = samples.measurement(starved=starved)
        return report.profile_lines(samples.profile(measured=measured))

    assert "so tight that cuDNN had to take slower kernels" in lines(2)
    assert "so tight" not in lines(0)
