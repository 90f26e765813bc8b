"""More processes that search the study that one plans with: one a GPU.

Each loads the model on its own device and waits until the study is open. What they measure is in
the study; they are ended when it is searched.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from autofit import session
from autofit.foresight import Foresight
from autofit.goals import Goal
from autofit.planner import Effort, help_search
from autofit.probe import device_named


@dataclass(frozen=True)
class Ask:
    """What a process needs to help."""

    model: str
    goal: Goal
    effort: Effort
    device: str
    dtype: str | None


class Team:
    """Processes that load their models from now on, and search within the block."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.faults: list[str] = []  # a line for each that failed
        self._members = [_Member(ask) for ask in asks]

    def __enter__(self) -> None:
        for member in self._members:
            member.release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End them all. A second call does nothing."""
        members, self._members = self._members, []
        self.faults += [fault for member in members if (fault := member.end()) is not None]


def devices(first: str, count: int) -> list[str]:
    """The devices of so many processes, from the first one on.

    Raises:
        BadInput: there are fewer.
    """
    if count == 1 or not first.startswith("cuda"):
        return [first] * count
    start = int(first.partition(":")[2] or 0)
    names = [f"cuda:{number}" for number in range(start, start + count)]
    for name in names:
        device_named(name)
    return names


class _Member:
    def __init__(self, ask: Ask) -> None:
        self._device = ask.device
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed at its end
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from autofit.team import main; main()"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is the planner's to handle
        )
        self._write(pickle.dumps(ask))

    def release(self) -> None:
        self._write(b"\n")

    def end(self) -> str | None:
        """Kill it, with the worker that it started. Returns what it had died of, if by itself."""
        code = self._process.poll()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of what it died before it had read
            self._process.stdin.close()
        if code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self._log.close()
        if not code:
            return None
        return f"the search on {self._device} ended early: {lines[-1][:300] if lines else code}"

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, and ``end`` says of what
            self._process.stdin.write(data)
            self._process.stdin.flush()


def main() -> None:
    """What each of the processes runs: the ask and the word to begin come by its input."""
    ask: Any = pickle.load(sys.stdin.buffer)
    assert isinstance(ask, Ask)
    with session.measuring(ask.model, ask.device, ask.dtype) as measurer:
        if not sys.stdin.buffer.read(1):
            return  # nobody plans any more
        threading.Thread(target=_end_with_planner, daemon=True).start()
        # The planner has made the dry run by now, and it is remembered on disk.
        foresight = Foresight(ask.model, ask.goal, ask.device, ask.dtype)
        help_search(measurer, ask.goal, ask.effort, ask.model, foresight.basis)


def _end_with_planner() -> None:
    """The planner holds the other end; when it is gone, however it went, this read returns."""
    os.read(sys.stdin.fileno(), 1)  # not by the buffer, whose lock Python needs to end the process
    os._exit(1)
