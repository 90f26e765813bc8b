"""The contenders of `bench_peers.py`: each makes a pipe ready to run within a budget.

Peers are called as their authors show it, without quantisation, and told what their users have to
work out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_ladder import LADDER, Rung, climb
from diffusers.hooks import apply_group_offloading

from autofit import anatomy, session, store
from autofit.foresight import Foresight
from autofit.goals import Goal
from autofit.planner import Effort, Planned, find_plan
from autofit.spec import (
    Attempt,
    AutofitError,
    Device,
    Failure,
    Phase,
    Pipeline,
    Role,
    Workload,
)
from autofit.trial.cap import Outside, capped
from autofit.units import GIB, MIB, parse_pixels

# What the peers that are told bytes leave free for the allocator's fragments, at each try.
SLACKS_BYTES = (GIB // 4, GIB, 2 * GIB)
# Over how many images autofit spreads the time to set up: as the CLI does; or, where blocks may be
# compiled, as one who makes many.
IMAGES = {"exact": 20, "numeric": 1000, "lossy": 20}
OFFLOAD_TILE_PX = 512  # under model offload the VAE decodes alone: a tile is all that it holds
UNET_UNITS = [
    f"{part}.{inside}"
    for part in ("down_blocks.*", "mid_block", "up_blocks.*")
    for inside in ("resnets.*", "attentions.*.transformer_blocks.*")
]


@dataclass(frozen=True)
class Run:
    """A case on this machine."""

    spec: dict[str, Any]
    pipeline: Pipeline
    device: Device
    outside: Outside
    room_bytes: int  # what torch may hold of the budget

    @property
    def target(self) -> str:
        return str(self.spec["device"])

    @property
    def workload(self) -> Workload:
        width, height = parse_pixels(self.spec["size"])
        steps, batch = self.spec["steps"], self.spec["batch"]
        return Workload(width, height, steps, batch, passes=self.pipeline.default_passes)

    @property
    def slack_bytes(self) -> int:
        return SLACKS_BYTES[self.spec["attempt"] - 1]

    def weight_bytes(self, *roles: Role) -> int:
        return sum(c.weight_bytes for c in self.pipeline.of_role(*roles))

    def activation_bytes(self, *phases: Phase) -> int:
        """The most that a phase of the plain pipe held beside its weights, by the floor's run.

        Raises:
            AutofitError: there was none.
        """
        found = self.spec["activation_bytes"]
        if found is None:
            raise AutofitError("tuned by the floor's activations, and the floor has none")
        return max(int(found[phase]) for phase in phases)


def autofit_within(pipe: Any, run: Run, fidelity: str) -> dict[str, Any]:
    """What ``autofit.apply`` does, but searched anew whatever profiles are stored; or, where an
    earlier run left its profile in the spec's ``plan_file``, that profile."""
    path = Path(run.spec["plan_file"]) if run.spec["plan_file"] else None
    planned = None if path and path.exists() else searched(pipe, run, fidelity)
    if planned is None:
        assert path is not None
        profile = store.load(path)
    else:
        profile = planned.profile
        if path is not None:
            store.save(profile, path)
    session.apply(pipe, profile=profile, device=run.target, enforce=False)  # the case's cap holds
    placement, facts = profile.plan.placement, profile.plan.facts(run.pipeline)
    moved = placement.traffic(facts, Phase.STEP)
    return {
        "plan": profile.plan.label,
        "planned": planned is not None,
        "images": IMAGES[fidelity],
        "trials": [tried(a) for a in planned.attempts] if planned else [],
        "resident_bytes": placement.resident_bytes(facts, Phase.STEP),
        "streamed_bytes": moved.pinned_bytes + moved.pageable_bytes,
    } | {k: v for k, v in placement.settings.items() if k.endswith("_bytes")}


def tried(attempt: Attempt) -> dict[str, Any]:
    """What a trial came to, in short."""
    outcome = attempt.outcome
    if isinstance(outcome, Failure):
        return {"plan": attempt.plan.label, "phase": outcome.phase, "error": outcome.detail}
    keys = ("image_s", "step_s", "decode_s", "warmup_s", "peak_bytes", "starved")
    return {"plan": attempt.plan.label} | {key: getattr(outcome, key) for key in keys}


def searched(pipe: Any, run: Run, fidelity: str) -> Planned:
    spec, size = run.spec, (run.workload.width, run.workload.height)
    goal = Goal(spec["budget_bytes"], size, spec["batch"], spec["steps"], fidelity=fidelity)
    effort = Effort(timeout_s=spec["search_s"], images=IMAGES[fidelity], fresh=True)
    foresight = Foresight(spec["model"], goal, run.target, spec["dtype"])
    own_caps = capped(run.outside, run.device.total_bytes, 0)  # it caps its trials itself
    with own_caps, session.measuring(pipe, run.target) as measurer:
        return find_plan(measurer, goal, effort, foresee=foresight.basis)


def resident(pipe: Any, run: Run) -> dict[str, Any]:
    pipe.to(run.target)
    return {"plan": 'pipe.to("cuda")'}


def vae_slicing(pipe: Any, run: Run) -> dict[str, Any]:
    pipe.to(run.target)
    pipe.vae.enable_slicing()
    return {"plan": 'pipe.to("cuda"), vae.enable_slicing()'}


def model_offload(pipe: Any, run: Run) -> dict[str, Any]:
    set_tile(pipe, OFFLOAD_TILE_PX)
    pipe.enable_model_cpu_offload(device=torch.device(run.target))
    return {"plan": f"enable_model_cpu_offload(), VAE tiles of {OFFLOAD_TILE_PX} px"}


def group_offload(pipe: Any, run: Run, level: str) -> dict[str, Any]:
    """The encoders leaf by leaf at any level: they have no block lists. The VAE stays."""
    for name, module in anatomy.modules(pipe).items():
        blocks = level == "block_level" and anatomy.role(name) is Role.DENOISER
        if anatomy.role(name) is Role.VAE:
            module.to(run.target)
            continue
        apply_group_offloading(
            module,
            torch.device(run.target),
            offload_type=level if blocks else "leaf_level",
            num_blocks_per_group=1 if blocks else None,
            use_stream=True,
            record_stream=True,
        )
    return {"plan": f"apply_group_offloading({level}, use_stream, record_stream), VAE resident"}


def flextensor(pipe: Any, run: Run) -> dict[str, Any]:
    """It streams one module within a share of the card, and knows of nothing else: T5 goes leaf by
    leaf, the other encoders stay where that leaves the denoiser a GiB, the VAE stays."""
    import flextensor as library

    phases = run.activation_bytes(*Phase)
    left_bytes = run.room_bytes - phases - run.slack_bytes - run.weight_bytes(Role.VAE)
    encoders = sorted(run.pipeline.of_role(Role.ENCODER), key=lambda c: c.weight_bytes)
    streams = {run.pipeline.denoiser.name}
    for encoder in encoders:
        if encoder.cls.startswith("T5") or left_bytes - encoder.weight_bytes < GIB:
            streams.add(encoder.name)
        else:
            left_bytes -= encoder.weight_bytes
    for name, module in anatomy.modules(pipe).items():
        if name not in streams:
            module.to(run.target)
        elif anatomy.role(name) is Role.ENCODER:
            apply_group_offloading(
                module, torch.device(run.target), offload_type="leaf_level", use_stream=True
            )
    name, lists = run.pipeline.denoiser.name, run.pipeline.denoiser.blocks
    config = library.OffloadConfig(
        include_patterns=UNET_UNITS if name == "unet" else [f"{b.path}.*" for b in lists],
        min_blocks=2,
        num_blocks=2,
        profiling_iters=5,
        max_gpu_mem_fraction=min(1.0, max(left_bytes, MIB) / run.spec["budget_bytes"]),
    )
    setattr(pipe, name, library.offload(getattr(pipe, name), config=config, name=name))
    return {"plan": f"{name} in {left_bytes / GIB:.2f} GiB, streamed: {', '.join(sorted(streams))}"}


def mmgp(pipe: Any, run: Run) -> dict[str, Any]:
    """Megabytes for each component, of which it holds one at a time. A component that its budget
    covers is loaded whole, so the first try gives a denoiser that fits without slack its size."""
    from mmgp import offload

    denoiser_bytes = run.weight_bytes(Role.DENOISER)
    left_bytes = run.room_bytes - run.activation_bytes(Phase.ENCODE, Phase.STEP)
    budget_mb = max(1, (left_bytes - run.slack_bytes) // MIB)
    if run.spec["attempt"] == 1 and denoiser_bytes < left_bytes:
        budget_mb = max(budget_mb, denoiser_bytes // MIB + 1)
    budgets = {"*": budget_mb, run.pipeline.denoiser.name: budget_mb}
    offload.all(
        pipe,
        pinnedMemory=True,
        quantizeTransformer=False,
        budgets=budgets,
        asyncTransfers=True,
        vram_safety_coefficient=0.9,
        perc_reserved_mem_max=0.9,
        verboseLevel=1,
    )
    return {"plan": f"all(budgets={budgets} MB, pinned, not quantised)"}


def diffusers_mm(pipe: Any, run: Run) -> dict[str, Any]:
    from diffusers_mm import ModelManager, managed

    manager = ModelManager(strategy="auto")
    managed(pipe, mm=manager, device=run.target)
    return {"plan": f"auto: {manager.applied_strategy}"}


def climbing(rung: Rung) -> Callable[[Any, Run], dict[str, Any]]:
    return lambda pipe, run: climb(pipe, rung, run.target)


def set_tile(pipe: Any, tile_px: int) -> None:
    """``enable_tiling`` alone takes its tile from the VAE's configuration: 1024 px, one tile."""
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size = tile_px
    pipe.vae.tile_latent_min_size = tile_px // pipe.vae_scale_factor


CONTENDERS: dict[str, Callable[[Any, Run], dict[str, Any]]] = {
    "floor": resident,
    "autofit": lambda pipe, run: autofit_within(pipe, run, "exact"),
    "autofit-numeric": lambda pipe, run: autofit_within(pipe, run, "numeric"),
    "autofit-lossy": lambda pipe, run: autofit_within(pipe, run, "lossy"),
    "diffusers-resident": resident,
    "diffusers-vae-slicing": vae_slicing,
    "diffusers-model-offload": model_offload,
    "diffusers-group-leaf": lambda pipe, run: group_offload(pipe, run, "leaf_level"),
    "diffusers-group-block": lambda pipe, run: group_offload(pipe, run, "block_level"),
    "flextensor": flextensor,
    "mmgp": mmgp,
    "diffusers-mm": diffusers_mm,
    **{name: climbing(rung) for name, rung in LADDER.items()},
}
