"""A model and a card that exist on paper, with a truth that the planner has to find out.

The truth starts from the cost model's arithmetic and bends it: each choice has its own factor,
drawn from a seed, on the compute and on the activations of the phases that it touches. The bus is
as fast as it is: a phase that overlaps takes its compute, or its transfers and what of a step's
compute they have nothing to do behind, whichever is longer.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
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
    Technique,
    Why,
    Workload,
)
from autofit.techniques.streamed import Streamed

STREAMED = Streamed()
MOST_IDLE = 0.2  # on an H100 a step of SDXL took 9 ms beyond its transfers, where 47 were compute

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
                  convolutional=True, group_norms=True),
        Component("text_encoder", "CLIPTextModel", Role.ENCODER, "float16", 246_000_000,
                  75_900_000),
        Component("text_encoder_2", "CLIPTextModel", Role.ENCODER, "float16", 1_390_000_000,
                  126_000_000),
        Component("unet", "UNet2DConditionModel", Role.DENOISER, "float16", 5_135_000_000,
                  58_900_000, (BlockList("up_blocks", 3, 2_480_000_000, 3_330_000_000),),
                  convolutional=True, group_norms=True),
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
FLUX = Pipeline(
    cls="FluxPipeline",
    components=(
        Component("vae", "AutoencoderKL", Role.VAE, "bfloat16", 168_000_000, 4_700_000,
                  convolutional=True, group_norms=True),
        Component("text_encoder", "CLIPTextModel", Role.ENCODER, "bfloat16", 246_000_000,
                  75_900_000),
        Component("text_encoder_2", "T5EncoderModel", Role.ENCODER, "bfloat16", 9_790_000_000,
                  263_000_000),
        Component("transformer", "FluxTransformer2DModel", Role.DENOISER, "bfloat16",
                  23_800_000_000, 113_000_000,
                  (BlockList("transformer_blocks", 19, 680_000_000, 12_910_000_000),
                   BlockList("single_transformer_blocks", 38, 283_000_000, 10_760_000_000))),
    ),
    fingerprint="1" * 64,
    default_width=1024,
    default_height=1024,
    size_multiple_px=16,
    token_px=16,
    hidden_size=3072,
    head_sizes=(128,),
    default_steps=28,
    default_passes=1,
    batched_guidance=False,
    offload_sequence=("text_encoder", "text_encoder_2", "transformer", "vae"),
    repeated_blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    vae_slices=True,
    vae_tiles="attributes",
)  # fmt: skip
FLUX_LARGE = Workload(1024, 1024, 28)


@dataclass(frozen=True)
class Bent:
    """By how much a whole world differs from the arithmetic."""

    activations: float = 1.0
    compute: float = 1.0
    bus: float = 1.0  # the rate that transfers reach, of the probed one
    reserved: float = 1.0  # bytes that the allocator holds for a live byte of activations


class World:
    """Measures plans by its own truth. ``calls`` counts them."""

    def __init__(
        self,
        budget_bytes: int,
        seed: int = 0,
        workload: Workload = LARGE,
        pipeline: Pipeline = SDXL,
        bent: Bent = Bent(),
    ) -> None:
        self.budget_bytes, self.seed, self.workload = budget_bytes, seed, workload
        self.pipeline, self.bent = pipeline, bent
        self.calls: list[Plan] = []

    def measure(self, plan: Plan, give_up_s: float | None) -> Outcome:
        self.calls.append(plan)
        outcome = self.truth(plan)
        if isinstance(outcome, Measurement) and give_up_s and outcome.image_s > give_up_s:
            detail = "its steps show that it cannot win"
            return Failure(Why.TOO_SLOW, detail, Phase.STEP, step_s=outcome.step_s[0])
        return outcome

    def best(self, plan: Plan) -> Outcome:
        """What a plan comes to when, if it is open, its weights fill the budget."""
        if not plan.placement.is_open:
            return self.truth(plan)
        facts = plan.facts(self.pipeline)
        live, reserved = self._needs(self._phases(plan))
        held_bytes = cost.held_bytes(plan.placement, facts)
        beside_bytes = max(reserved.values()) - held_bytes
        room_bytes = self.budget_bytes - cost.outside_bytes(CARD) - math.ceil(beside_bytes)
        decode_bytes = math.ceil(self.bent.reserved * (live[Phase.DECODE] - held_bytes))
        placement = plan.placement.fitted(facts, room_bytes, decode_bytes)
        return self.truth(plan if placement is None else cost.placed(plan, placement))

    def truth(self, plan: Plan) -> Outcome:
        phases = self._phases(plan)
        live, reserved = self._needs(phases)
        outside_bytes = cost.outside_bytes(CARD)
        # What the decode takes is there from the first image's decode on.
        order = reversed(Phase) if plan.placement.borrows else Phase
        for phase in order:
            needed_bytes = int(reserved[phase]) + outside_bytes
            if needed_bytes > self.budget_bytes:
                return Failure(Why.OUT_OF_MEMORY, "Tried to allocate", phase, needed_bytes)
        spent_s = {p: self._seconds(phases, p) for p in Phase}
        image_s = spent_s[Phase.ENCODE] + spent_s[Phase.DECODE]
        image_s += self.workload.steps * spent_s[Phase.STEP]
        return Measurement(
            image_s=image_s,
            peak_bytes=int(max(reserved.values())) + outside_bytes,
            encode_s=spent_s[Phase.ENCODE],
            step_s=(spent_s[Phase.STEP],) * 4,
            decode_s=spent_s[Phase.DECODE],
            warmup_s=sum(t.setup_s for t in plan.techniques),
            phase_peak_bytes={p.value: int(live[p]) for p in Phase},
            non_torch_bytes=outside_bytes,
        )

    def _phases(self, plan: Plan) -> cost.Phases:
        return cost.Phases(plan, plan.facts(self.pipeline), self.workload)

    def _needs(self, of: cost.Phases) -> tuple[dict[Phase, float], dict[Phase, float]]:
        """Live and reserved bytes by phase."""
        plan, facts = of.plan, of.facts
        weights, bent = {}, {}
        for phase in Phase:
            weights[phase] = cost.weight_bytes(plan, facts, phase)
            activations = of.activation_bytes(phase)
            bent[phase] = activations * self.bent.activations * self._factor(plan, phase, "b")
        stay = {p for p in Phase if of.stays(p)}
        # What stays of another phase is reserved, and not live.
        taken = {p: sum(bent[q] for q in stay | {p}) for p in Phase}
        live = {p: weights[p] + bent[p] for p in Phase}
        reserved = {p: weights[p] + taken[p] * self.bent.reserved for p in Phase}
        borrowed_bytes = cost.borrowed_bytes(plan.placement, facts)
        left_bytes = sum(bent[p] for p in stay) * self.bent.reserved
        reserved[Phase.STEP] -= min(borrowed_bytes, left_bytes)
        return live, reserved

    def _seconds(self, of: cost.Phases, phase: Phase) -> float:
        plan, facts, factor = of.plan, of.facts, self._factor(of.plan, phase, "s")
        busy_s = of.compute_s(CARD, phase) * factor * self.bent.compute
        traffic = plan.placement.traffic(facts, phase)
        moving_s = cost.transfer_s(traffic, facts, CARD, phase) / self.bent.bus
        if not traffic.overlaps:
            return busy_s + factor * moving_s
        idle = random.Random(f"{self.seed} idle").uniform(0, MOST_IDLE)
        idle_s = idle * busy_s if phase is Phase.STEP and moving_s else 0.0
        return max(busy_s, moving_s + idle_s)

    def _factor(self, plan: Plan, phase: Phase, kind: str) -> float:
        factor = _drawn(self.seed, "all", phase.value, kind)
        placement = plan.placement.opened
        for technique in (*plan.techniques[:-1], placement):
            if technique is placement or phase in _touched(technique, self.pipeline, self.workload):
                most = cost.hope(technique, {}) if kind == "s" else 0.2
                factor *= _drawn(self.seed, technique.label, phase.value, kind, most=most)
        return factor


@cache
def _touched(technique: Technique, pipeline: Pipeline, workload: Workload) -> frozenset[Phase]:
    return frozenset(technique.effects(pipeline, workload))


def opened(plan: Plan) -> Plan:
    """As it stands among the legal plans: without what the budget set."""
    return cost.placed(plan, plan.placement.opened)


@cache
def _drawn(seed: int, *names: str, most: float = 0.2) -> float:
    """From ``most`` better than predicted to a quarter worse."""
    return random.Random(f"{seed} {names}").uniform(max(0.8, 1 - most), 1.25)


def gib(number: float) -> int:
    return int(number * GIB)
