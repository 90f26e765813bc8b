"""How far a profile holds here: every level, and every reason why it does not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import samples
import worlds

from autofit import gpus
from autofit.match import Level, Match, environment, match, needed_bytes, unlike_description
from autofit.spec import (
    Device,
    Environment,
    Evidence,
    Failure,
    Outcome,
    Part,
    Pipeline,
    Plan,
    Profile,
    Why,
    Workload,
)
from autofit.techniques import KINDS

GIB = samples.GIB
BUDGET = 8 * GIB
H200 = worlds.CARD
H100 = replace(H200, name="NVIDIA H100", total_bytes=80 * GIB)
MEASURED = samples.measurement(peak_bytes=7 * GIB, non_torch_bytes=2 * GIB)
PROFILE = samples.profile(
    pipeline=worlds.SDXL.cls,
    fingerprint=worlds.SDXL.fingerprint,
    workload=worlds.LARGE,
    budget_bytes=BUDGET,
    plan=Plan((samples.TILED, samples.RESIDENT)),
    measured=MEASURED,
    on=environment(H200, BUDGET),
    components=tuple(map(Part.of, worlds.SDXL.components)),
)


@dataclass(frozen=True)
class Asked:
    """What the profile is wanted for: by default exactly what it was measured for."""

    profile: Profile = PROFILE
    pipeline: Pipeline = worlds.SDXL
    device: Device = H200
    workload: Workload = worlds.LARGE
    budget_bytes: int = BUDGET

    @property
    def answer(self) -> Match:
        return match(self.profile, self.pipeline, self.device, self.workload, self.budget_bytes)


def with_versions(device: Device = H200, **versions: str) -> Device:
    return replace(device, versions=samples.VERSIONS | versions)


def with_part(name: str, **changes: Any) -> Pipeline:
    parts = (replace(c, **changes) if c.name == name else c for c in worlds.SDXL.components)
    return replace(worlds.SDXL, components=tuple(parts), fingerprint="2" * 64)


def seen(*outcomes: tuple[Outcome, Device]) -> Profile:
    """The profile with what came of its plan on other machines, the latest last."""
    evidence = (Evidence(o, environment(device, BUDGET)) for o, device in outcomes)
    return replace(PROFILE, evidence=tuple(evidence))


FAILED = Failure(Why.OUT_OF_MEMORY, "")
NEWER = with_versions(torch="2.12.0", driver="590.48.01")
WIDE = replace(worlds.LARGE, width=worlds.LARGE.width + 8)
OTHER = f"it is for another {worlds.SDXL.cls} "

CASES: dict[str, tuple[Asked, Level, str]] = {
    # ---------------------------------------------------------------- nothing differs that counts
    "the same": (Asked(), Level.SAME, "measured on NVIDIA H200 with these versions"),
    "another python": (
        Asked(device=with_versions(python="3.11.0")),
        Level.SAME,
        "measured on NVIDIA H200 with these versions",
    ),
    "another bus rate": (
        Asked(device=replace(H200, pinned_bytes_s=1e9, context_bytes=1)),
        Level.SAME,
        "measured on NVIDIA H200 with these versions",
    ),
    "a budget below the one planned for, above the peak": (
        Asked(budget_bytes=7 * GIB),
        Level.SAME,
        "measured on NVIDIA H200 with these versions",
    ),
    "evidence of this very machine": (
        Asked(seen((MEASURED, H100)), device=H100),
        Level.SAME,
        "measured on NVIDIA H100 with these versions",
    ),
    "a failure here and a success since": (
        Asked(seen((FAILED, H200), (MEASURED, H200))),
        Level.SAME,
        "measured on NVIDIA H200 with these versions",
    ),
    "a failure elsewhere": (
        Asked(seen((FAILED, H100), (FAILED, NEWER))),
        Level.SAME,
        "measured on NVIDIA H200 with these versions",
    ),
    # ---------------------------------------------------------------- the same card
    "other versions": (
        Asked(device=with_versions(torch="2.12.0", diffusers="0.43.0")),
        Level.SOFTWARE,
        "measured with torch 2.11.0+cu130, here 2.12.0, diffusers 0.42.1, here 0.43.0",
    ),
    "another driver": (
        Asked(device=with_versions(driver="590.48.01")),
        Level.SOFTWARE,
        "measured with driver 580.95.05, here 590.48.01",
    ),
    "a package that only one of the two has": (
        Asked(
            device=replace(H200, versions={"xformers": "0.0.35"}),
            profile=replace(PROFILE, on=replace(PROFILE.on, versions={"torch": "2.11.0"})),
        ),
        Level.SOFTWARE,
        "measured with torch 2.11.0, here none, xformers unknown, here 0.0.35",
    ),
    "other versions than the latest of the evidence": (
        Asked(
            seen((MEASURED, with_versions(torch="2.9.0")), (MEASURED, NEWER), (MEASURED, H100)),
            device=with_versions(torch="2.13.0"),
        ),
        Level.SOFTWARE,
        "measured with torch 2.12.0, here 2.13.0, driver 590.48.01, here 580.95.05",
    ),
    "evidence of this card with other versions": (
        Asked(seen((MEASURED, H100)), device=with_versions(H100, torch="2.12.0")),
        Level.SOFTWARE,
        "measured with torch 2.11.0+cu130, here 2.12.0",
    ),
    # ---------------------------------------------------------------- another card
    "another card with enough memory": (
        Asked(device=H100),
        Level.CARD,
        "measured on NVIDIA H200 (139.80 GiB), not on NVIDIA H100 (80.00 GiB)",
    ),
    "a card of the same name with other memory": (
        Asked(device=replace(H200, total_bytes=70 * GIB)),
        Level.CARD,
        "measured on NVIDIA H200 (139.80 GiB), not on NVIDIA H200 (70.00 GiB)",
    ),
    "a card that only failed it with other versions": (
        Asked(seen((FAILED, with_versions(H100, torch="2.10.0"))), device=H100),
        Level.CARD,
        "measured on NVIDIA H200 (139.80 GiB), not on NVIDIA H100 (80.00 GiB)",
    ),
    "a card of the table": (
        Asked(device=gpus.device_for("rtx-4090")),
        Level.CARD,
        "measured on NVIDIA H200 (139.80 GiB), not on NVIDIA GeForce RTX 4090 (23.53 GiB)",
    ),
    "another card with too little memory": (
        Asked(device=replace(H100, name="NVIDIA L4", total_bytes=5 * GIB)),
        Level.NONE,
        "NVIDIA L4 has 5.00 GiB, and the plan needs ",
    ),
    # ---------------------------------------------------------------- another workload
    "a smaller width": (
        Asked(workload=replace(worlds.LARGE, width=512)),
        Level.WORKLOAD,
        "measured for 1024x1024, batch 1, 30 steps, asked for 512x1024, batch 1, 30 steps",
    ),
    "more steps": (
        Asked(workload=replace(worlds.LARGE, steps=500)),
        Level.WORKLOAD,
        "measured for 1024x1024, batch 1, 30 steps, asked for 1024x1024, batch 1, 500 steps",
    ),
    "a smaller batch": (
        Asked(replace(PROFILE, workload=replace(worlds.LARGE, batch=4))),
        Level.WORKLOAD,
        "measured for 1024x1024, batch 4, 30 steps, asked for 1024x1024, batch 1, 30 steps",
    ),
    "fewer frames": (
        Asked(replace(PROFILE, workload=replace(worlds.LARGE, frames=9))),
        Level.WORKLOAD,
        "measured for 1024x1024, 9 frames, batch 1, 30 steps, asked for 1024x1024, batch 1",
    ),
    "other versions and a smaller workload": (
        Asked(device=with_versions(torch="2.12.0"), workload=replace(worlds.LARGE, height=512)),
        Level.WORKLOAD,
        "measured with torch 2.11.0+cu130, here 2.12.0; measured for 1024x1024, batch 1",
    ),
    "too little memory and a smaller workload": (
        Asked(
            device=replace(H100, total_bytes=5 * GIB), workload=replace(worlds.LARGE, height=512)
        ),
        Level.NONE,
        "NVIDIA H100 has 5.00 GiB, and the plan needs ",
    ),
    "a larger width": (
        Asked(workload=WIDE),
        Level.NONE,
        "width 1032 is above the 1024 that it was measured for",
    ),
    "a larger height, though fewer pixels": (
        Asked(workload=replace(worlds.LARGE, width=512, height=1032)),
        Level.NONE,
        "height 1032 is above the 1024 that it was measured for",
    ),
    "a larger batch": (
        Asked(workload=replace(worlds.LARGE, batch=2)),
        Level.NONE,
        "batch 2 is above the 1 that it was measured for",
    ),
    "more frames": (
        Asked(workload=replace(worlds.LARGE, frames=9)),
        Level.NONE,
        "frames 9 is above the 1 that it was measured for",
    ),
    "fewer passes": (
        Asked(workload=replace(worlds.LARGE, passes=1)),
        Level.NONE,
        "it is for 2 denoiser passes a step, and 1 are asked",
    ),
    # ---------------------------------------------------------------- another budget
    "a budget below the peak": (
        Asked(budget_bytes=7 * GIB - 1),
        Level.NONE,
        "its peak 7.00 GiB is above the budget 7.00 GiB",
    ),
    "a budget above the one planned for": (
        Asked(budget_bytes=BUDGET + GIB),
        Level.NONE,
        "it is for 8.00 GiB, and 9.00 GiB allow a faster plan",
    ),
    # ---------------------------------------------------------------- another pipeline
    "another class": (
        Asked(pipeline=worlds.FLUX),
        Level.NONE,
        "it is for StableDiffusionXLPipeline, this pipe is a FluxPipeline",
    ),
    "a part that the profile has not": (
        Asked(replace(PROFILE, components=PROFILE.components[1:]),
              replace(worlds.SDXL, fingerprint="2" * 64)),
        Level.NONE,
        OTHER + "(vae is only in this pipe)",
    ),
    "a part that the pipe has not": (
        Asked(pipeline=replace(
            worlds.SDXL, components=worlds.SDXL.components[1:], fingerprint="2" * 64)),
        Level.NONE,
        OTHER + "(vae is only in the profile)",
    ),
    "a part of another class": (
        Asked(pipeline=with_part("vae", cls="AutoencoderTiny")),
        Level.NONE,
        OTHER + "(vae is AutoencoderKL in the profile, AutoencoderTiny here)",
    ),
    "a part of another dtype": (
        Asked(pipeline=with_part("unet", dtype="bfloat16")),
        Level.NONE,
        OTHER + "(unet is float16 in the profile, bfloat16 here)",
    ),
    "a part of another size": (
        Asked(pipeline=with_part("text_encoder", weight_bytes=2 * 246_000_000)),
        Level.NONE,
        OTHER + "(text_encoder has 234.60 MiB in the profile, 469.21 MiB here)",
    ),
    "other adapters": (
        Asked(pipeline=replace(worlds.SDXL, adapters=("lineart", "ink"), fingerprint="2" * 64)),
        Level.NONE,
        OTHER + "(adapters none in the profile, lineart, ink here)",
    ),
    "adapters that were loaded then": (
        Asked(replace(PROFILE, adapters=("lineart",)), replace(worlds.SDXL, fingerprint="2" * 64)),
        Level.NONE,
        OTHER + "(adapters lineart in the profile, none here)",
    ),
    "a configuration that no part shows": (
        Asked(pipeline=replace(worlds.SDXL, fingerprint="2" * 64)),
        Level.NONE,
        OTHER + "(configuration, dtypes or adapters differ)",
    ),
    "another pipe, by a profile of schema 1": (
        Asked(replace(PROFILE, components=()), with_part("unet", dtype="bfloat16")),
        Level.NONE,
        OTHER + "(configuration, dtypes or adapters differ)",
    ),
    # ---------------------------------------------------------------- what does not work here
    "a plan that cannot run": (
        Asked(replace(PROFILE, plan=Plan((KINDS["sdpa"]("cudnn"), samples.RESIDENT))),
              device=replace(H100, kernels=())),
        Level.NONE,
        "its plan cannot run on NVIDIA H100 (sdpa(kernel=cudnn): ",
    ),
    "a plan of techniques that do not go together": (
        Asked(replace(
            PROFILE, plan=Plan((KINDS["traced"](), KINDS["sequential_offload"]())))),
        Level.NONE,
        "its plan cannot run on NVIDIA H200 (traced: not with sequential_offload: ",
    ),
    "failed evidence": (
        Asked(seen((FAILED, NEWER)), device=NEWER),
        Level.NONE,
        "verified on this machine, it failed: out of memory",
    ),
    "a failure where it was measured first": (
        Asked(seen((replace(FAILED, why=Why.CRASH), H200))),
        Level.NONE,
        "verified on this machine, it failed: crash",
    ),
    "failed evidence and a smaller workload": (
        Asked(seen((FAILED, H100)), device=H100, workload=replace(worlds.LARGE, height=512)),
        Level.NONE,
        "verified on this machine, it failed: out of memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_level_and_the_reason_of(case: str) -> None:
    asked, level, reason = CASES[case]
    answer = asked.answer
    assert answer.level is level
    assert answer.reason.startswith(reason)
    assert str(answer) == f"{level.value}: {answer.reason}"
    assert "\n" not in str(answer)


def test_every_level_has_a_case() -> None:
    assert {level for _, level, _ in CASES.values()} == set(Level)


def test_a_level_is_trusted_less_than_those_before_it() -> None:
    assert sorted(Level, key=lambda level: level.rank) == [
        Level.SAME, Level.SOFTWARE, Level.CARD, Level.WORKLOAD, Level.NONE,
    ]  # fmt: skip
    assert [level for level in Level if level.needs_trial] == [
        Level.SOFTWARE, Level.CARD, Level.WORKLOAD,
    ]  # fmt: skip
    assert [level for level in Level if not level.is_usable] == [Level.NONE]


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (0.96, True), (1.04, True),
                                              (0.94, False), (1.06, False)])  # fmt: skip
def test_the_sizes_of_parts_may_differ_by_as_much_as_a_dry_run_errs(
    factor: float, same: bool
) -> None:
    size_bytes = int(factor * 5_135_000_000)
    differing = unlike_description(PROFILE, with_part("unet", weight_bytes=size_bytes))
    assert (differing is None) is same


def test_a_description_does_not_ask_for_the_fingerprint_of_a_loaded_pipe() -> None:
    assert unlike_description(PROFILE, replace(worlds.SDXL, fingerprint="2" * 64)) is None
    assert unlike_description(replace(PROFILE, components=()), worlds.SDXL) is None


# ---------------------------------------------------------------- what a card needs


def test_a_smaller_context_leaves_more_of_the_card() -> None:
    lean = replace(H100, total_bytes=7 * GIB - 1, context_bytes=GIB // 2)
    assert needed_bytes(MEASURED, lean) < 7 * GIB - GIB
    assert Asked(device=lean).answer.level is Level.CARD
    heavy = replace(lean, context_bytes=4 * GIB)
    assert needed_bytes(MEASURED, heavy) > 8 * GIB
    assert Asked(device=heavy).answer.level is Level.NONE


def test_a_card_that_holds_exactly_what_the_plan_needs_is_enough() -> None:
    need = needed_bytes(MEASURED, H100)
    assert Asked(device=replace(H100, total_bytes=need)).answer.level is Level.CARD
    short = Asked(device=replace(H100, total_bytes=need - 1)).answer
    assert short.level is Level.NONE
    assert re.fullmatch(r"NVIDIA H100 has .+ GiB, and the plan needs .+ GiB", short.reason)


@pytest.mark.parametrize(
    "technique", [KINDS[n]() for n in ("regional_compile", "cuda_graph", "triton_group_norm")]
)
def test_what_compiles_is_not_held_against_a_card_of_the_table(technique: Any) -> None:
    """Whether it compiles depends on what is installed, which nobody knows of a card on paper."""
    profile = replace(PROFILE, plan=Plan((technique, samples.RESIDENT)))
    assert Asked(profile, device=gpus.device_for("rtx-4090")).answer.level is Level.CARD
    refused = replace(PROFILE, plan=Plan((KINDS["half_precision"]("bfloat16"), samples.RESIDENT)))
    assert Asked(refused, device=gpus.device_for("gtx-1660-ti")).answer.level is Level.NONE


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("device", "budget_bytes", "cap"),
    [
        (H200, BUDGET, "emulated"),
        (replace(H200, total_bytes=10 * GIB), 9 * GIB, "card"),
        (replace(H200, total_bytes=10 * GIB), 9 * GIB - 1, "emulated"),
        (replace(H200, total_bytes=GIB), BUDGET, "card"),
        (replace(H200, kind="cpu"), BUDGET, "tracked"),
    ],
)
def test_the_cap_is_emulated_where_the_card_is_clearly_larger(
    device: Device, budget_bytes: int, cap: str
) -> None:
    assert environment(device, budget_bytes).cap == cap


def test_the_environment_is_the_device_s() -> None:
    assert environment(H200, BUDGET) == Environment(
        "NVIDIA H200", (9, 0), 150_109_880_320, "emulated", samples.VERSIONS, 55e9, 9e9
    )
