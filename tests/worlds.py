"""A model and a card that exist on paper, with a truth that the planner has to find out.

The truth starts from the cost model's arithmetic and bends it: each choice has its own factor,
drawn from a seed, on the seconds and on the activations of the phases that it touches.
"""

from __future__ import annotations

import random
from functools import cache

from samples import GIB, device

from autofit import cost
from autofit.spec import (
    BlockList,
    Component,
    Failure,
    Kernel,
    Measurement,
    Outcome,
    Phase,
    Pipeline,
    Plan,
    Role,
    Why,
    Workload,
)

KERNELS = tuple(
    Kernel(name, dtype, size)
    for name in ("cudnn", "flash", "efficient", "math")
    for dtype in ("float16", "bfloat16")
    for size in (64, 128)
)
CARD = device(kernels=KERNELS, flops_s={"float16": 7e14, "bfloat16": 7e14, "float32": 5e13})
SDXL = Pipeline(
    cls="StableDiffusionXLPipeline",
    components=(
        Component("vae", "AutoencoderKL", Role.VAE, "float16", 167_000_000, 9_400_000,
                  convolutional=True),
        Component("text_encoder", "CLIPTextModel", Role.ENCODER, "float16", 246_000_000,
                  75_900_000),
        Component("text_encoder_2", "CLIPTextModel", Role.ENCODER, "float16", 1_390_000_000,
                  126_000_000),
        Component("unet", "UNet2DConditionModel", Role.DENOISER, "float16", 5_135_000_000,
                  58_900_000, (BlockList("up_blocks", 3, 2_480_000_000, 3_330_000_000),),
                  convolutional=True),
    ),
    fingerprint="0" * 64,
    default_width=1024,
    default_height=1024,
    size_multiple_px=8,
    token_px=8,
    hidden_size=320,
    head_sizes=(64,),
    default_steps=50,
    default_passes=2,
    batched_guidance=True,
    offload_sequence=("text_encoder", "text_encoder_2", "unet", "vae"),
    repeated_blocks=("BasicTransformerBlock",),
    sliceable_attention=True,
    vae_slices=True,
    vae_tiles="attributes",
)  # fmt: skip
LARGE = Workload(1024, 1024, 30, passes=2)


class World:
    """Measures plans by its own truth. ``calls`` counts them."""

    def __init__(self, budget_bytes: int, seed: int = 0, workload: Workload = LARGE) -> None:
        self.budget_bytes, self.seed, self.workload = budget_bytes, seed, workload
        self.calls: list[Plan] = []

    def measure(self, plan: Plan, give_up_s: float | None) -> Outcome:
        self.calls.append(plan)
        outcome = self.truth(plan)
        if isinstance(outcome, Measurement) and give_up_s and outcome.image_s > give_up_s:
            return Failure(Why.TOO_SLOW, "its steps show that it cannot win", Phase.STEP)
        return outcome

    def truth(self, plan: Plan) -> Outcome:
        predicted = cost.predict(plan, SDXL, CARD, self.workload)
        spent_s = {p: predicted.phase_s[p] * self._bent(plan, p, "s") for p in Phase}
        facts = plan.facts(SDXL)
        needs = {
            p: cost.weight_bytes(plan, facts, p)
            + cost.activation_bytes(plan, facts, self.workload, p) * self._bent(plan, p, "b")
            for p in Phase
        }
        for phase in Phase:
            if needs[phase] + cost.outside_bytes(CARD) > self.budget_bytes:
                needed = int(needs[phase]) + cost.outside_bytes(CARD)
                return Failure(Why.OUT_OF_MEMORY, "Tried to allocate", phase, needed)
        image_s = spent_s[Phase.ENCODE] + spent_s[Phase.DECODE]
        image_s += self.workload.steps * spent_s[Phase.STEP]
        return Measurement(
            image_s=image_s,
            peak_bytes=int(max(needs.values())) + cost.outside_bytes(CARD),
            encode_s=spent_s[Phase.ENCODE],
            step_s=(spent_s[Phase.STEP],) * 4,
            decode_s=spent_s[Phase.DECODE],
            warmup_s=0.0,
            phase_peak_bytes={p.value: int(needs[p]) for p in Phase},
            non_torch_bytes=cost.outside_bytes(CARD),
        )

    def _bent(self, plan: Plan, phase: Phase, kind: str) -> float:
        factor = _factor(self.seed, "all", phase.value, kind)
        for technique in plan.techniques:
            if phase in technique.effects(SDXL, self.workload) or technique is plan.placement:
                factor *= _factor(self.seed, technique.label, phase.value, kind)
        return factor


@cache
def _factor(seed: int, *names: str) -> float:
    return random.Random(f"{seed} {names}").uniform(0.8, 1.25)


def gib(number: float) -> int:
    return int(number * GIB)
