"""One contender on one case: what a child of `bench_peers.py` does, forked by `bench_fork.py`.

What is found is sent as soon as it is known. The pipe, the cap and the clock are the same for all
contenders.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from bench_contenders import CONTENDERS, Run, set_tile

from autofit import anatomy, cost, probe
from autofit.probe import memory
from autofit.spec import AutofitError, Device, Phase, Role
from autofit.trial import generate, release
from autofit.trial.cap import Outside, capped
from autofit.trial.meter import Meter, tracked

WARMUP_STEPS = 8  # FlexTensor needs one to discover and five to profile before it streams
WARMUP_AGAIN_STEPS = 2  # a graph of what streams is captured in the second image
DISTRIBUTIONS = {
    "flextensor": ("flextensor",),
    "mmgp": ("mmgp", "optimum-quanto"),
    "diffusers-mm": ("diffusers-mm",),
}


# mmgp asserts one dtype a component, and SDXL's VAE is cast to float32 to decode in float16; under
# diffusers-mm's streams the cast misses the pinned copies.
NEEDS_BFLOAT16 = ("mmgp", "diffusers-mm")


@dataclass(frozen=True)
class Generation:
    seconds: float
    meter: Meter
    pixels: np.ndarray[Any, Any]


class Stages:
    """Seconds of a child's stages, sent as each ends: one that hangs has said where."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send, self._last = send, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        self._send({"stages_s": self.seconds})


def answer(pipe: Any, spec: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Hand a pipe on the CPU to the contender under the cap, and measure what it does then."""
    stages = Stages(send)
    target = probe.device_named(spec["device"])
    before_bytes = memory.before_context(target)
    device = probe.probe_device(spec["device"])
    outside = Outside.of(target, device, before_bytes)
    send(machine(spec, device))
    stages.end("device")
    cast(pipe, spec["contender"])
    if spec["tile_px"] is not None:
        set_tile(pipe, spec["tile_px"])
    pipeline = probe.facts(pipe)
    roles = (Role.ENCODER, Role.DENOISER, Role.VAE)
    sizes = {r.value: sum(c.weight_bytes for c in pipeline.of_role(r)) for r in roles}
    send({"dtype": pipeline.denoiser.dtype, "weight_bytes": sizes})
    release(target)
    aside_bytes = max(cost.outside_bytes(device), outside.held_bytes())
    cap_bytes = spec["budget_bytes"]
    run = Run(spec, pipeline, device, outside, (cap_bytes or device.total_bytes) - aside_bytes)
    stages.end("pipe")
    with capped(outside, cap_bytes, aside_bytes) as renew_cap:
        with reporting(run):
            found, generations = measured(pipe, run, stages, renew_cap)
        send(found | judged(run, generations))


def measured(
    pipe: Any, run: Run, stages: Stages, renew_cap: Callable[[], None]
) -> tuple[dict[str, Any], list[Generation]]:
    """Prepare, warm up, and make the images twice, in full; the cap less the libraries that were
    loaded by then."""
    found = CONTENDERS[run.spec["contender"]](pipe, run)
    stages.end("prepare")
    if run.outside.device.type == "cpu":
        generation(pipe, run, 1)  # nothing can be traced while tensors are followed
    with tracked(pipe, run.outside.device, run.spec["budget_bytes"]) as tracker:
        warm = generation(pipe, run, WARMUP_STEPS, tracker)
    generation(pipe, run, WARMUP_AGAIN_STEPS)
    renew_cap()
    stages.end("warmup")
    runs = [generation(pipe, run, run.workload.steps) for _ in range(2)]
    stages.end("runs")
    found["setup_s"] = stages.seconds["prepare"] + stages.seconds["warmup"]
    return found, [warm, *runs]


def generation(pipe: Any, run: Run, steps: int, tracker: Any = None) -> Generation:
    if run.outside.device.type == "cuda":
        torch.cuda.synchronize(run.outside.device)
    meter, start = Meter(pipe, run.outside.device, tracker), time.perf_counter()
    with meter.running():
        images = generate(pipe, run.workload, steps)
    return Generation(time.perf_counter() - start, meter, np.asarray(images))


def judged(run: Run, generations: list[Generation]) -> dict[str, Any]:
    """The figures of a line. The peak is the warm-up's too; the seconds are not."""
    full, pixels = generations[1:], generations[-1].pixels
    if not np.isfinite(pixels).all() or pixels.std() == 0.0:
        raise AutofitError("the image is not finite, or one flat colour")
    reserved_bytes = max(g.meter.reserved_bytes for g in generations)
    outside_bytes = run.outside.held_bytes()
    cap_bytes, peak_bytes = run.spec["budget_bytes"], reserved_bytes + outside_bytes
    held = {p: max(g.meter.phase_bytes.get(p, 0) for g in generations) for p in Phase}
    found: dict[str, Any] = {
        "image_s": statistics.mean(g.seconds for g in full),
        "runs_s": [g.seconds for g in full],
        "encode_s": statistics.mean(g.meter.encode_s for g in full),
        "step_s": statistics.median(s for g in full for s in g.meter.step_s),
        "decode_s": statistics.mean(g.meter.decode_s for g in full),
        "peak_bytes": peak_bytes,
        "starved": sum(g.meter.starved for g in generations),
        "outside_bytes": outside_bytes,
        "within_budget": cap_bytes is None or peak_bytes <= cap_bytes,
        "image_crc32": zlib.crc32(np.ascontiguousarray(pixels).tobytes()),
        "image_mean": float(pixels.mean()),
        "image_std": float(pixels.std()),
        "error": None,
    }
    if run.spec["contender"] == "floor":
        weight_bytes = run.pipeline.weight_bytes
        found["activation_bytes"] = {p.value: max(0, held[p] - weight_bytes) for p in Phase}
    return found


def machine(spec: dict[str, Any], device: Device) -> dict[str, Any]:
    names = DISTRIBUTIONS.get(spec["contender"], ())
    return {
        "gpu": device.name,
        "versions": {**device.versions, **{name: metadata.version(name) for name in names}},
        "pinned_bytes_s": device.pinned_bytes_s,
    }


def cast(pipe: Any, contender: str) -> None:
    """Give who needs it copies in bfloat16 of a float16 pipe's weights."""
    if contender in NEEDS_BFLOAT16 and anatomy.denoiser(pipe).dtype is torch.float16:
        for module in anatomy.modules(pipe).values():
            module.to(torch.bfloat16)


@contextmanager
def reporting(run: Run) -> Iterator[None]:
    """Let ``mem_get_info`` tell of a card of the budget's size: peers read it, none reads the cap.
    autofit is told its budget."""
    budget_bytes, contender = run.spec["budget_bytes"], run.spec["contender"]
    if budget_bytes is None or contender.startswith("autofit"):
        yield
        return

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return max(0, run.room_bytes - torch.cuda.memory_reserved(device)), budget_bytes

    with anatomy.attribute(torch.cuda, "mem_get_info", mem_get_info):
        yield
