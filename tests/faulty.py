"""A technique that ends or holds up the worker in which it is applied."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from autofit.spec import Effect, Fidelity, Phase, Pipeline, Slot, Technique, Workload


def left_behind(planner: int) -> list[str]:
    """The command of a process that a worker started before its end, as a compiler would be."""
    return ["sleep", f"86399.{planner}"]


FAULTS: dict[str, Callable[[], Any]] = {
    "SIGSEGV": lambda: ctypes.string_at(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(86399),
}


@dataclass(frozen=True)
class Faulty(Technique):
    name: ClassVar[str] = "faulty"
    slot: ClassVar[Slot] = Slot.GUIDANCE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    fault: str

    @contextmanager
    def applied(self, pipe: Any, device: str) -> Iterator[None]:
        subprocess.Popen(left_behind(os.getppid()))
        FAULTS[self.fault]()
        yield

    def effects(self, pipeline: Pipeline, workload: Workload) -> Mapping[Phase, Effect]:
        return {Phase.STEP: Effect(seconds=0.2)}
