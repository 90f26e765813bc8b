"""Techniques together: any legal plan can be applied, used and undone."""

from __future__ import annotations

import gc
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pipes
from snapshots import differences, snapshot

from autofit import anatomy, probe, techniques
from autofit.spec import BadInput, Device, Pipeline, Plan, Slot, Technique, Workload
from autofit.techniques import CANDIDATES
from autofit.trial import generate

WORKLOAD = Workload(64, 64, 2, batch=2, passes=2)
PLANS = int(os.environ.get("AUTOFIT_RANDOM_PLANS", "6"))  # a pipeline
# Compiling to C++ takes half a minute a plan here; the contract suite applies it to every pipeline.
LEFT_OUT = ("regional_compile", "cuda_graph(compiled)")


def random_plan(draw: random.Random, pipeline: Pipeline, device: Device) -> Plan | None:
    """A plan of anything that can be applied, pointless or not; None where it clashes."""
    chosen: list[Technique] = []
    for slot in Slot:
        options: list[Technique | None] = [
            t for t in CANDIDATES if t.slot is slot and t.label not in LEFT_OUT
        ]
        technique = draw.choice(options if slot is Slot.PLACEMENT else [*options, None, None])
        chosen += [technique] if technique else []
    try:
        plan = Plan(tuple(chosen))
    except BadInput:
        return None
    return plan if techniques.why_not(plan, pipeline, device, WORKLOAD) is None else None


@pytest.fixture(scope="session")
def plans(model: str, pipes: Pipes, device: str) -> list[Plan]:
    draw = random.Random(f"plans of {model}")
    pipeline, probed = probe.facts(pipes[model]), probe.probe_device(device)
    found: list[Plan] = []
    while len(found) < PLANS:
        plan = random_plan(draw, pipeline, probed)
        found += [plan] if plan and plan not in found else []
    return found


def test_any_legal_plan_is_applied_used_and_undone(
    model: str, pipes: Pipes, device: str, plans: list[Plan]
) -> None:
    pipe: Any = pipes[model]
    held_bytes = left_bytes(device)
    for plan in plans:
        # their weights come back in other memory
        addresses = plan.placement.name not in ("model_offload", "streamed")
        before = snapshot(pipe, memory=addresses)
        with techniques.applied(plan, pipe, device), torch.no_grad():
            images = np.asarray(generate(pipe, WORKLOAD, 2))
            again = np.asarray(generate(pipe, WORKLOAD, 2))
        assert images.shape == (2, 64, 64, 3), plan.label
        assert np.isfinite(images).all(), plan.label
        # the first may be recorded, with torch's attention in place of another kernel's
        rough = "bfloat16" in plan.label
        assert np.allclose(images, again, atol=0.06 if rough else 0.02), plan.label
        assert differences(before, snapshot(pipe, memory=addresses)) == [], plan.label
        assert not any(t.is_pinned() for t in weights(pipe)), plan.label
        # a library's workspace may be there that was not
        assert left_bytes(device) <= held_bytes + 2**26, plan.label


def weights(pipe: Any) -> list[torch.Tensor]:
    return [t for m in anatomy.modules(pipe).values() for _, _, t in anatomy.tensors(m)]


def left_bytes(device: str) -> int:
    """On the device, of live tensors."""
    if device == "cpu":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)
