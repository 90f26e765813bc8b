"""Plausible nouns for tests. Their figures were measured nowhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autofit.spec import (
    Device,
    Environment,
    Evidence,
    Failure,
    Kernel,
    Measurement,
    Part,
    Phase,
    Plan,
    Profile,
    Rung,
    Why,
    Workload,
)
from autofit.techniques import KINDS

GIB = 2**30
VERSIONS = {
    "python": "3.12.3",
    "torch": "2.11.0+cu130",
    "diffusers": "0.42.1",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "cuda": "13.0",
    "driver": "580.95.05",
}
HALF, TILED = KINDS["half_precision"]("float16"), KINDS["tiled_vae"](512, 0.25)
RESIDENT, OFFLOAD = KINDS["resident"](), KINDS["model_offload"]()
FAST = Plan((HALF, TILED, RESIDENT))
SLOW = Plan((OFFLOAD,))


def measurement(**changes: Any) -> Measurement:
    facts: dict[str, Any] = {
        "image_s": 0.8653124,
        "peak_bytes": 3_672_113_152,
        "encode_s": 0.0121,
        "step_s": (0.0173, 0.0161, 0.0161),
        "decode_s": 0.0412,
        "warmup_s": 4.75,
        "phase_peak_bytes": {
            "encode": 2_147_483_648,
            "step": 2_936_012_800,
            "decode": 3_145_728_000,
        },
        "non_torch_bytes": 526_385_152,
        "steps_run": 50,
        "runs_s": (0.8653124, 0.8649),
        "verified": True,
        "psnr_db": 41.25,
        "reference": "resident",
    }
    return Measurement(**(facts | changes))


def profile(**changes: Any) -> Profile:
    facts: dict[str, Any] = {
        "pipeline": "StableDiffusionPipeline",
        "fingerprint": "5d41402abc4b2a76",
        "workload": Workload(512, 512, 50, passes=2),
        "budget_bytes": 4 * GIB,
        "plan": FAST,
        "measured": measurement(),
        "on": Environment("NVIDIA H200", (9, 0), 150_109_880_320, "emulated", VERSIONS),
    }
    return Profile(**(facts | changes))


def travelled() -> Profile:
    """A profile with all that schema 2 can hold: two machines ran its plan again."""
    found = profile()
    rates = {"pinned_bytes_s": 55.4e9, "pageable_bytes_s": 7.25e9}
    newer = replace(found.on, versions=VERSIONS | {"driver": "590.48.01"}, **rates)
    card = Environment("NVIDIA GeForce RTX 3060", (8, 6), 12_622_168_064, "emulated", VERSIONS)
    again = measurement(image_s=0.8541, runs_s=(0.8541, 0.8541), psnr_db=None, reference=None)
    lean = measurement(
        image_s=2.75,
        peak_bytes=2_411_724_800,
        phase_peak_bytes={
            "encode": 1_342_177_280,
            "step": 1_879_048_192,
            "decode": 1_610_612_736,
        },
        steps_run=6,
        runs_s=(),
        verified=False,
    )
    return replace(
        found,
        on=replace(found.on, **rates),
        components=(
            Part("vae", "AutoencoderKL", "float32", 334_615_452),
            Part("text_encoder", "CLIPTextModel", "float32", 492_265_168),
            Part("unet", "UNet2DConditionModel", "float32", 3_438_167_536),
        ),
        adapters=("lineart",),
        ladder=(Rung(Plan((HALF, OFFLOAD)), lean),),
        evidence=(
            Evidence(again, newer),
            Evidence(Failure(Why.OUT_OF_MEMORY, "", Phase.DECODE, 4_831_838_208), card),
        ),
    )


def device(**changes: Any) -> Device:
    facts: dict[str, Any] = {
        "kind": "cuda",
        "name": "NVIDIA H200",
        "total_bytes": 150_109_880_320,
        "capability": (9, 0),
        "context_bytes": 526_385_152,
        "host_limit_bytes": 128 * GIB,
        "pinned_bytes_s": 55e9,
        "pageable_bytes_s": 9e9,
        "memory_bytes_s": 4.1e12,
        "flops_s": {"float16": 7.1e14, "float32": 5.1e13},
        "kernels": (
            Kernel("flash", "float16", 80),
            Kernel("flash", "float16", 40),
            Kernel("math", "float32", 40),
        ),
        "versions": VERSIONS,
    }
    return Device(**(facts | changes))
