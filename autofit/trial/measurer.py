"""Who runs the trials: this process on the caller's pipe, or a worker process on its own.

A worker answers on its own pipe, never stdout. Whatever ends it (crash, signal, hang) is a Failure
of the trial it was running; the next trial starts a new one.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from autofit import probe
from autofit.child import Child
from autofit.probe import memory
from autofit.spec import (
    AutofitError,
    BadInput,
    Device,
    Failure,
    Measurement,
    NothingFits,
    Outcome,
    Pipeline,
    Why,
)
from autofit.trial.cap import Outside
from autofit.trial.run import TRIAL_STEPS, Request, measure, release

START_S = 900.0  # to import, build or load the pipe and probe the device
# A trial without an answer for so many times as long as any took before is taken for hung; never in
# less than HANG_S. Of the trials in tests/golden none took a minute, compiling included. Of the
# first trial nothing is known; large models take minutes on a CPU.
SLOWER, HANG_S = 10.0, 180.0
FIRST_S = {"cuda": 300.0, "cpu": 900.0}
OUT_OF_HOST = "the system may have ended it because the host's memory ran out: try --host-ram"


@dataclass(frozen=True)
class Subject:
    """What is planned for: the facts of the pipe and of the device, and what others hold of it."""

    pipeline: Pipeline
    device: Device
    others_bytes: int = 0
    others: str = ""  # who they are, as far as the driver says


def subject_of(pipe: Any, device: Device, outside: Outside) -> Subject:
    others = memory.holders_text(outside.device) if outside.others_bytes else ""
    return Subject(probe.facts(pipe), device, outside.others_bytes, others)


class Measurer(Protocol):
    subject: Subject

    def measure(self, request: Request) -> Outcome:
        """Run one trial.

        Raises:
            NothingFits: other processes hold too much of the card for it.
        """

    def renew(self) -> None:
        """Start afresh where that is possible: nothing loaded lazily, nothing fragmented."""

    def close(self) -> None: ...


class InProcess:
    """Trials on the caller's own pipe. Its weights must be on the CPU."""

    def __init__(self, pipe: Any, device: str) -> None:
        self.pipe = pipe
        self.device = probe.device_named(device)
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            release(self.device)  # pipes that the caller dropped, in cycles that nobody collected
        before_bytes = memory.before_context(self.device)  # the probe makes the context
        facts = probe.probe_device(device)
        self._outside = Outside.of(self.device, facts, before_bytes)
        self.subject = subject_of(pipe, facts, self._outside)

    def measure(self, request: Request) -> Outcome:
        return measure(self.pipe, request, self._outside)

    def renew(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """What a worker needs to build its pipe."""

    model: str
    dtype: str | None
    device: str


class Worker:
    """Trials in a process of their own, which keeps its pipe from trial to trial. ``child`` is one
    that was started before.

    Raises:
        BadInput: the worker could not load the model; its own words.
    """

    def __init__(self, job: Job, child: Child | None = None) -> None:
        self.job = job
        self._child: Child | None = None
        self._slowest_s = 0.0  # of the answers so far, each as that of a short trial
        try:
            self.subject: Subject = self._start(child)
        except BaseException:
            self.close()
            raise

    def measure(self, request: Request) -> Outcome:
        longer = _longer(request)
        limit_s = self._limit_s(longer)
        if request.left_s is not None:  # a first trial that hangs ends not long after the search
            limit_s = min(limit_s, request.left_s + HANG_S)
        try:
            if self._child is None:
                self._start()
            assert self._child is not None
            start = time.monotonic()
            self._child.connection.send(request)
            outcome = self._receive(limit_s)
        except (EOFError, ConnectionError) as error:
            return self._crash(error)
        except TimeoutError:
            self.close()
            return Failure(Why.HANG, f"no answer in {limit_s:.0f} s; the worker was killed")
        if isinstance(outcome, str):
            raise NothingFits(outcome, None)
        assert isinstance(outcome, Measurement | Failure)
        self._slowest_s = max(self._slowest_s, (time.monotonic() - start) / longer)
        return outcome

    def _limit_s(self, longer: float) -> float:
        known_s = SLOWER * self._slowest_s or FIRST_S[self.subject.device.kind]
        return max(HANG_S, known_s * longer)

    def renew(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        """End the process; the next trial starts another."""
        self._end()

    def _start(self, child: Child | None = None) -> Subject:
        self._child = child or Child()
        try:
            self._child.connection.send(self.job)
            subject = self._receive(START_S)
        except (EOFError, ConnectionError, TimeoutError) as error:
            raise AutofitError(
                f"the worker for {self.job.model} did not start: {self._crash(error).detail}"
            ) from error
        if isinstance(subject, str):
            self.close()
            raise BadInput(subject)
        assert isinstance(subject, Subject)
        return subject

    def _receive(self, limit_s: float) -> Any:
        assert self._child is not None
        if not self._child.connection.poll(limit_s):
            raise TimeoutError
        return self._child.connection.recv()

    def _crash(self, error: BaseException) -> Failure:
        code, said = self._end() or (0, "")
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        words = said or repr(error)
        if code == -signal.SIGKILL and not isinstance(error, TimeoutError):  # else it was us
            words = OUT_OF_HOST
        return Failure(Why.CRASH, f"worker ended by {ended}; {words}")

    def _end(self) -> tuple[int, str] | None:
        """End the process, if there is one. Returns its exit code and last words."""
        child, self._child = self._child, None
        return None if child is None else child.end()


def _longer(request: Request) -> float:
    """How many times as long as a short trial this may take by its steps."""
    return max(1.0, 2 * request.workload.steps / TRIAL_STEPS[0]) if request.full else 1.0
