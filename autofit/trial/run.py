"""One plan, applied, run and undone: a Measurement or a Failure. Only here OOM is a result."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autofit import anatomy, pinning, probe, techniques
from autofit.spec import Failure, Measurement, Outcome, Phase, Plan, Slot, Why, Workload
from autofit.trial.cap import Outside, capped, check_trial_room
from autofit.trial.generation import generate
from autofit.trial.meter import Meter, asked_bytes, is_out_of_memory, tracked
from autofit.trial.reference import Array, Reference
from autofit.trial.seams import seam_psnr_db

WARMUP_STEPS = 3  # the first is recorded or traced, the second compiles, the third is steady, timed
# The first carries transfers; more of the later ones while they take under TRIAL_S together: steps
# bound by launches on the CPU are noisy. Of the 28 trials of tests/golden with more than twelve
# steps, in 27 the median of the first eleven later ones is within 1.2 % of that of all.
TRIAL_STEPS = (6, 12)
TRIAL_S = 0.5


@dataclass(frozen=True)
class Request:
    """What a trial is asked: the plan, and how far to go.

    ``cap_bytes`` is for the whole process; None measures without a cap. ``set_aside_bytes`` of it
    are for what is not torch's, as earlier trials saw it: libraries load lazily, so a fresh process
    does not show it yet. ``give_up_s``: stop as soon as the whole image is sure to take longer.
    ``full``: the whole number of steps, twice. ``needed_bytes``: what the card must have for it,
    where that is known to be less than the cap. ``left_s``: of the time to search, where the trial
    is part of one.
    """

    plan: Plan
    workload: Workload
    cap_bytes: int | None
    set_aside_bytes: int = 0
    give_up_s: float | None = None
    full: bool = False
    output: Path | None = None  # where the image goes, to be another trial's reference
    reference: Path | None = None  # what to compare with: ``output`` of another trial
    needed_bytes: int | None = None
    left_s: float | None = None


class _CannotWin(Exception):
    def __init__(self, step_s: float) -> None:
        super().__init__()
        self.step_s = step_s


def measure(pipe: Any, request: Request, outside: Outside) -> Outcome:
    """Run one trial. The pipe is found with its weights on the CPU, and left so.

    Raises:
        NothingFits: other processes hold so much of the card that it would fail of them.
    """
    check_trial_room(outside, request.needed_bytes or request.cap_bytes or 0)
    failure: Failure | None = None
    trial = _Trial(pipe, request, outside)
    if not request.plan.placement.page_locks:
        pinning.let_go()  # else its copies would be faster than they are
    try:
        with capped(outside, request.cap_bytes, request.set_aside_bytes), torch.no_grad():
            outcome: Outcome = trial.run()
    except _CannotWin as seen:
        detail = "its steps show that it cannot win"
        failure = Failure(Why.TOO_SLOW, detail, Phase.STEP, step_s=seen.step_s)
    except Exception as error:  # a trial runs other people's code: whatever it raises is a result
        if is_out_of_memory(error):
            failure = trial.out_of_memory(error)
        else:
            failure = Failure(Why.ERROR, _one_line(error), trial.phase)
    # Out of the except block first: the traceback keeps the failed run's tensors alive.
    release(outside.device)
    pinning.let_go(but=anatomy.modules(pipe).values())  # what was cast for the trial
    return failure or outcome


def release(device: torch.device) -> None:
    """Give back what a trial left: collected tensors, the allocator's cached blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Run:
    """One generation: the steps asked for, and what came of them."""

    steps: int
    meter: Meter
    seconds: float
    images: Any
    decoded: list[torch.Tensor]  # the latents that these were decoded from, decode by decode

    @property
    def latents(self) -> Array | None:
        """All of them in a row, float32."""
        rows = [latents.float().numpy().ravel() for latents in self.decoded]
        return np.concatenate(rows) if rows else None


class _Trial:
    def __init__(self, pipe: Any, request: Request, outside: Outside) -> None:
        self.pipe, self.request, self.outside = pipe, request, outside
        self.device = outside.device
        self.meters: list[Meter] = []
        self.reference: Reference | None = None
        self.decoded: list[torch.Tensor] = []  # of the latest whole generation

    @property
    def phase(self) -> Phase | None:
        return self.meters[-1].phase if self.meters else None

    def run(self) -> Outcome:
        outcome, request = self._outcome(), self.request
        if not (request.full and isinstance(outcome, Measurement)):
            return outcome
        latents = next(iter(self.decoded), None)
        release(self.device)  # what the plan held
        seam_db = seam_psnr_db(self.pipe, request.plan, latents, self.device, request.cap_bytes)
        return replace(outcome, seam_psnr_db=seam_db)

    def _outcome(self) -> Outcome:
        self.reference = Reference.load(self.request.reference)
        if self.device.type == "cpu":
            self._track()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        with techniques.applied(self.request.plan, self.pipe, str(self.device)):
            for _ in range(techniques.images_to_settle(self.request.plan)):
                warm = self._generate(min(WARMUP_STEPS, self.request.workload.steps))
            _finish(self.device)
            warmup_s = time.perf_counter() - start
            if self.request.full:
                return self._verify(warmup_s)
            run = self._generate(self._steps(warm.meter), give_up_s=self.request.give_up_s)
            if unusable := _unusable(run.images):
                return unusable
            step_s = run.meter.step_s
            later_s = statistics.median(step_s[1:] or step_s)
            calls = _scheduler_calls(self.request.workload.steps, warm, run)
            image_s = run.meter.encode_s + step_s[0] + (calls - 1) * later_s + run.meter.decode_s
            # Every trial's warm-up has as many steps: its image costs nothing more.
            return self._judged(run, self._comparable(warm), image_s, warmup_s)

    def _track(self) -> None:
        """Follow tensor memory through one step, on the CPU, where no allocator counts it.

        Without the execution technique: recorded and compiled code makes its tensors out of sight.
        """
        eager = tuple(t for t in self.request.plan.techniques if t.slot is not Slot.EXECUTION)
        with techniques.applied(Plan(eager), self.pipe, str(self.device)):
            self._generate(1, tracking=True)

    def _verify(self, warmup_s: float) -> Outcome:
        runs = [self._generate(self.request.workload.steps) for _ in range(2)]
        runs_s = tuple(run.seconds for run in runs)
        run = runs[-1]
        self.decoded = run.decoded
        if unusable := _unusable(run.images):
            return unusable
        image_s = statistics.mean(runs_s)
        return self._judged(run, self._comparable(run), image_s, warmup_s, runs_s)

    def _comparable(self, run: _Run) -> _Run:
        """One of as many steps as the reference: another number makes another image."""
        if self.reference is None or self.reference.steps == run.steps:
            return run
        return self._generate(self.reference.steps)

    def _steps(self, warm: Meter) -> int:
        low, high = TRIAL_STEPS
        wanted = int(TRIAL_S / max(warm.step_s[-1], 1e-4))
        return min(self.request.workload.steps, max(low, min(high, wanted)))

    def _generate(
        self, steps: int, *, give_up_s: float | None = None, tracking: bool = False
    ) -> _Run:
        cap_bytes = self.request.cap_bytes if tracking else None
        start = time.perf_counter()
        tracking_mode = tracked(self.pipe, self.device, cap_bytes) if tracking else _plain()
        with tracking_mode as tracker:
            meter = Meter(self.pipe, self.device, tracker)
            self.meters.append(meter)
            with meter.running(self._judge(meter, give_up_s)):
                images = generate(self.pipe, self.request.workload, steps)
        seconds = time.perf_counter() - start
        return _Run(steps, meter, seconds, images, meter.taken_latents())

    def _judge(self, meter: Meter, give_up_s: float | None) -> Callable[[int], None] | None:
        if give_up_s is None:
            return None

        def on_step(done: int) -> None:
            if done >= 3 and meter.projected_s(self.request.workload.steps) > give_up_s:
                raise _CannotWin(meter.fastest_step_s())

        return on_step

    def _judged(
        self,
        run: _Run,
        shown: _Run,
        image_s: float,
        warmup_s: float,
        runs_s: tuple[float, ...] = (),
    ) -> Outcome:
        """What a generation comes to, whose image is that of ``shown``. A short one over the cap is
        a measurement all the same: it shows what is to be set aside, where a whole one has failed
        its purpose."""
        request, meter = self.request, run.meter
        if unusable := _unusable(shown.images):
            return unusable
        peak_bytes = max(m.reserved_bytes for m in self.meters) + self.outside.held_bytes()
        if request.full and request.cap_bytes is not None and peak_bytes > request.cap_bytes:
            detail = "what is not torch's grew beyond what was set aside for it"
            return Failure(Why.OVER_BUDGET, detail, needed_bytes=peak_bytes)
        image = (np.asarray(shown.images) * 255).round().astype(np.uint8)
        dtype, latents = probe.dtype_of(anatomy.denoiser(self.pipe)), shown.latents
        if request.output is not None:
            self.reference = Reference.of(image, shown.steps, request.plan, latents, dtype)
            with suppress(OSError):  # whoever asked for the file sees that there is none
                self.reference.save(request.output)
        psnr_db = latents_psnr_db = None
        if self.reference is not None:
            psnr_db = self.reference.psnr_db(image)
            latents_psnr_db = self.reference.latents_psnr_db(latents)
            if refusal := self.reference.refusal(psnr_db, latents_psnr_db, request.plan, dtype):
                return Failure(Why.BAD_OUTPUT, refusal)
        return Measurement(
            image_s=image_s,
            peak_bytes=peak_bytes,
            encode_s=meter.encode_s,
            step_s=meter.step_s,
            decode_s=meter.decode_s,
            warmup_s=warmup_s,
            phase_peak_bytes=self._phase_peaks(),
            non_torch_bytes=self.outside.held_bytes(),
            steps_run=len(meter.step_s),
            runs_s=runs_s,
            verified=bool(runs_s),
            psnr_db=psnr_db,
            latents_psnr_db=latents_psnr_db,
            reference=self.reference.plan if self.reference else None,
            starved=sum(m.starved for m in self.meters),
            fallbacks=request.plan.fallbacks(self.pipe),
        )

    def _phase_peaks(self) -> dict[str, int]:
        """The highest of all runs, the warm-up's included: that one must fit too."""
        return {p.value: max(m.phase_bytes.get(p.value, 0) for m in self.meters) for p in Phase}

    def out_of_memory(self, error: BaseException) -> Failure:
        needed = asked_bytes(error)
        if self.device.type == "cuda":  # the phase's highest: the plan is undone by now
            needed += torch.cuda.max_memory_allocated(self.device) + self.outside.held_bytes()
        return Failure(Why.OUT_OF_MEMORY, _one_line(error), self.phase, needed or None)


def _unusable(images: Any) -> Failure | None:
    pixels = np.asarray(images)
    if np.isfinite(pixels).all() and pixels.std() > 0.0:
        return None
    return Failure(Why.BAD_OUTPUT, "the image is not finite, or one flat colour")


def _scheduler_calls(steps: int, first: _Run, second: _Run) -> int:
    """How often ``steps`` call the scheduler, from two runs: PNDM makes one step more than it is
    asked for, Heun twice as many less one."""
    (few, few_calls), (more, calls) = ((r.steps, len(r.meter.step_s)) for r in (first, second))
    if few == more:
        return calls
    return calls + (steps - more) * (calls - few_calls) // (more - few)


@contextmanager
def _plain() -> Iterator[None]:
    yield None


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
