"""One plan, applied, run and undone: a Measurement or a Failure. The only file that catches OOM."""

from __future__ import annotations

import gc
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autofit import probe, techniques
from autofit.probe import memory
from autofit.spec import Failure, Measurement, Outcome, Phase, Plan, Slot, Why, Workload
from autofit.trial.meter import Meter, asked_bytes, tracked

PROMPT = "a lighthouse on a rocky coast at dusk, waves, photograph"
SEED = 0
WARMUP_STEPS = 2  # the first learns the order of streams, traces and compiles; the second is steady
TRIAL_STEPS = (4, 10)  # the first carries transfers; more of the later ones while they take under
TRIAL_S = 1.0  # this long together: steps bound by launches on the CPU are noisy
_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Request:
    """What a trial is asked: the plan, and how far to go.

    ``cap_bytes`` is for the whole process; None measures without a cap. ``set_aside_bytes`` of it
    are for what is not torch's, as earlier trials saw it: libraries load lazily, so a fresh process
    does not show it yet. ``give_up_s``: stop as soon as the whole image is sure to take longer.
    ``full``: the whole number of steps, twice.
    """

    plan: Plan
    workload: Workload
    cap_bytes: int | None
    set_aside_bytes: int = 0
    give_up_s: float | None = None
    full: bool = False
    output: Path | None = None  # where the image goes, uint8, (batch, height, width, 3)
    reference: Path | None = None  # the image to compare with
    reference_label: str | None = None


class _CannotWin(Exception):
    pass


def measure(pipe: Any, request: Request, device: torch.device, others_bytes: int) -> Outcome:
    """Run one trial. The pipe is found with its weights on the CPU, and left so.

    ``others_bytes`` is what other processes hold on the card.
    """
    failure: Failure | None = None
    trial = _Trial(pipe, request, device, others_bytes)
    try:
        with _capped(device, request, others_bytes), torch.no_grad():
            outcome: Outcome = trial.run()
    except torch.OutOfMemoryError as error:
        failure = trial.out_of_memory(error)
    except _CannotWin:
        failure = Failure(Why.TOO_SLOW, "its steps show that it cannot win", Phase.STEP)
    except Exception as error:  # a trial runs other people's code: whatever it raises is a result
        if any(text in str(error) for text in _NO_MEMORY):
            failure = trial.out_of_memory(error)
        else:
            failure = Failure(Why.ERROR, _one_line(error), trial.phase)
    # Out of the except block first: the traceback keeps the failed run's tensors alive.
    release(device)
    return failure or outcome


def generate(
    pipe: Any, workload: Workload, steps: int, *, prompt: str = PROMPT, seed: int = SEED
) -> Any:
    """Run the pipe for a workload. Returns its images, float, (batch, height, width, 3)."""
    asked = {
        "prompt": [prompt] * workload.batch,
        "width": workload.width,
        "height": workload.height,
        "num_inference_steps": steps,
        "generator": [torch.Generator("cpu").manual_seed(seed + i) for i in range(workload.batch)],
        "output_type": "np",
    }
    known = inspect.signature(type(pipe).__call__).parameters
    if workload.frames > 1 and "num_frames" in known:
        asked["num_frames"] = workload.frames
    if workload.passes == 1 and probe.batches_guidance(pipe):
        asked["guidance_scale"] = 1.0
    out = pipe(**asked)
    return out.images if hasattr(out, "images") else out.frames


def release(device: torch.device) -> None:
    """Give back what a trial left: collected tensors, the allocator's cached blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class _Trial:
    def __init__(
        self, pipe: Any, request: Request, device: torch.device, others_bytes: int
    ) -> None:
        self.pipe, self.request, self.device = pipe, request, device
        self.others_bytes = others_bytes
        self.meters: list[Meter] = []

    @property
    def phase(self) -> Phase | None:
        return self.meters[-1].phase if self.meters else None

    def run(self) -> Outcome:
        if self.device.type == "cpu":
            self._track()
        start = time.perf_counter()
        with techniques.applied(self.request.plan, self.pipe, str(self.device)):
            warm = self._generate(min(WARMUP_STEPS, self.request.workload.steps))[0]
            _finish(self.device)
            warmup_s = time.perf_counter() - start
            if self.request.full:
                return self._verify(warmup_s)
            steps = self._steps(warm)
            meter, _, images = self._generate(steps, give_up_s=self.request.give_up_s)
            step_s = meter.step_s
            later_s = statistics.median(step_s[1:] or step_s)
            image_s = meter.encode_s + step_s[0] + (self.request.workload.steps - 1) * later_s
            return self._judged(meter, image_s + meter.decode_s, warmup_s, images)

    def _track(self) -> None:
        """Follow tensor memory through one step, on the CPU, where no allocator counts it.

        Without the execution technique: recorded and compiled code makes its tensors out of sight.
        """
        eager = tuple(t for t in self.request.plan.techniques if t.slot is not Slot.EXECUTION)
        with techniques.applied(Plan(eager), self.pipe, str(self.device)):
            self._generate(1, tracking=True)

    def _verify(self, warmup_s: float) -> Outcome:
        runs = [self._generate(self.request.workload.steps) for _ in range(2)]
        meter, _, images = runs[-1]
        runs_s = tuple(seconds for _, seconds, _ in runs)
        return self._judged(meter, statistics.mean(runs_s), warmup_s, images, runs_s)

    def _steps(self, warm: Meter) -> int:
        low, high = TRIAL_STEPS
        wanted = int(TRIAL_S / max(warm.step_s[-1], 1e-4))
        return min(self.request.workload.steps, max(low, min(high, wanted)))

    def _generate(
        self, steps: int, *, give_up_s: float | None = None, tracking: bool = False
    ) -> tuple[Meter, float, Any]:
        cap_bytes = self.request.cap_bytes if tracking else None
        start = time.perf_counter()
        tracking_mode = tracked(self.pipe, self.device, cap_bytes) if tracking else _plain()
        with tracking_mode as tracker:
            meter = Meter(self.pipe, self.device, tracker)
            self.meters.append(meter)
            with meter.running(self._judge(meter, give_up_s)):
                images = generate(self.pipe, self.request.workload, steps)
        return meter, time.perf_counter() - start, images

    def _judge(self, meter: Meter, give_up_s: float | None) -> Callable[[int], None] | None:
        if give_up_s is None:
            return None

        def on_step(done: int) -> None:
            if done >= 3 and meter.projected_s(self.request.workload.steps) > give_up_s:
                raise _CannotWin

        return on_step

    def _judged(
        self,
        meter: Meter,
        image_s: float,
        warmup_s: float,
        images: Any,
        runs_s: tuple[float, ...] = (),
    ) -> Outcome:
        request = self.request
        pixels = np.asarray(images)
        if not np.isfinite(pixels).all() or pixels.std() == 0.0:
            return Failure(Why.BAD_OUTPUT, "the image is not finite, or one flat colour")
        peak_bytes = max(m.reserved_bytes for m in self.meters) + self._non_torch_bytes()
        if request.cap_bytes is not None and peak_bytes > request.cap_bytes:
            detail = "what is not torch's grew beyond what was set aside for it"
            return Failure(Why.OVER_BUDGET, detail, needed_bytes=peak_bytes)
        image = (pixels * 255).round().astype(np.uint8)
        if request.output is not None:
            np.save(request.output, image)
        return Measurement(
            image_s=image_s,
            peak_bytes=peak_bytes,
            encode_s=meter.encode_s,
            step_s=meter.step_s,
            decode_s=meter.decode_s,
            warmup_s=warmup_s,
            phase_peak_bytes=self._phase_peaks(),
            non_torch_bytes=self._non_torch_bytes(),
            steps_run=len(meter.step_s),
            runs_s=runs_s,
            verified=bool(runs_s),
            psnr_db=_psnr_db(image, request.reference),
            reference=request.reference_label if request.reference else None,
        )

    def _phase_peaks(self) -> dict[str, int]:
        """The highest of all runs, the warm-up's included: that one must fit too."""
        return {p.value: max(m.phase_bytes.get(p.value, 0) for m in self.meters) for p in Phase}

    def _non_torch_bytes(self) -> int:
        return non_torch_bytes(self.device, self.others_bytes)

    def out_of_memory(self, error: BaseException) -> Failure:
        needed = asked_bytes(error)
        if self.device.type == "cuda":
            needed += torch.cuda.memory_allocated(self.device) + self._non_torch_bytes()
        return Failure(Why.OUT_OF_MEMORY, _one_line(error), self.phase, needed or None)


@contextmanager
def _plain() -> Iterator[None]:
    yield None


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def _psnr_db(image: np.ndarray[Any, Any], reference: Path | None) -> float | None:
    """Peak signal-to-noise ratio in dB of 8-bit images; infinite where they are equal."""
    if reference is None or not reference.exists():
        return None
    other = np.load(reference)
    if other.shape != image.shape:
        return None
    error = float(np.mean((image.astype(np.float32) - other.astype(np.float32)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def non_torch_bytes(device: torch.device, others_bytes: int) -> int:
    """What this process holds on the card outside torch's allocator: context and libraries."""
    if device.type != "cuda":
        return 0
    used = memory.used_bytes(device)
    if used is None:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        used = total_bytes - free_bytes
    return max(0, used - others_bytes - torch.cuda.memory_reserved(device))


@contextmanager
def _capped(device: torch.device, request: Request, others_bytes: int) -> Iterator[None]:
    """Make the allocator refuse what would take the process over the cap; lifted on exit."""
    if device.type != "cuda" or request.cap_bytes is None:
        yield
        return
    total = memory.total_bytes(device)
    outside = max(request.set_aside_bytes, non_torch_bytes(device, others_bytes))
    allowed = request.cap_bytes - outside
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, allowed) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
