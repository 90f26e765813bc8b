"""More processes, one a GPU: they search the study that one plans with, or plan goal after goal.

Each loads the model on its own device. Who searches along waits until the study is open; what it
measures is in the study, and it is ended when that is searched. Who plans is given a goal at a time
and answers by a connection, or helps with one that another plans. None outlives the process that
started it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from autofit import session
from autofit.child import Child
from autofit.foresight import Foresight
from autofit.goals import Goal
from autofit.planner import Answer, Effort, Listener, Planned, answered, help_search
from autofit.probe import card_name, device_named
from autofit.search import Progress
from autofit.spec import AutofitError, BadInput
from autofit.trial import Measurer

END_S = 10.0  # for a process that has closed its connection to be gone
MAIN = """
from autofit.child import Child
worker = Child()  # loads torch while this process does
from autofit.team import {0}
{0}(worker)
"""


@dataclass(frozen=True)
class Ask:
    """What a process needs to help, or to plan goals that differ from this one in the budget."""

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
    """The devices of so many processes, from the first one on: like cards, since what one measures
    is to hold for the others.

    Raises:
        BadInput: there are fewer, or others among them.
    """
    if count == 1 or not first.startswith("cuda"):
        return [first] * count
    start = int(first.partition(":")[2] or 0)
    names = [f"cuda:{number}" for number in range(start, start + count)]
    cards = {name: card_name(device_named(name)) for name in names}
    for name, card in cards.items():
        if card != cards[names[0]]:
            raise BadInput(
                f"workers {count}: {name} is {card}, {names[0]} is {cards[names[0]]}, and workers"
                " need like cards; choose them by CUDA_VISIBLE_DEVICES, or take --workers 1"
            )
    return names


class _Member:
    def __init__(self, ask: Ask, main: str = "search_along", *open_fds: int) -> None:
        self._device = ask.device
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed at its end
        self._process = subprocess.Popen(
            [sys.executable, "-c", MAIN.format(main), *map(str, open_fds)],
            pass_fds=open_fds,
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


@dataclass(frozen=True)
class _Order:
    """What a ``Planner``'s process is to do: plan a goal, or help who does."""

    goal: Goal
    after: Planned | None
    resumes: bool
    helps: bool = False


class Planner(_Member):
    """A process that plans a goal at a time. ``number`` tells it from the others."""

    def __init__(self, ask: Ask, number: int) -> None:
        self.number = number
        self.goal: Goal | None = None  # that it is at
        self.after: Planned | None = None  # what it knows from a larger budget
        self.connection, theirs = Pipe()
        with theirs:
            super().__init__(ask, "plan_goals", theirs.fileno())

    def begin(self, goal: Goal, after: Planned | None, resumes: bool) -> None:
        """``resumes`` what another has begun: what that had measured is not forgotten."""
        self.goal, self.after = goal, after
        self._send(_Order(goal, after, resumes))

    def help(self, leader: Planner) -> None:
        """Search along with another, knowing what it knew, until nothing is left to try."""
        assert leader.goal is not None
        self.goal, self.after = leader.goal, leader.after
        self._send(_Order(leader.goal, leader.after, resumes=True, helps=True))

    def stop(self) -> None:
        """To help, after the trial that it is at."""
        self._send(None)

    def _send(self, order: _Order | None) -> None:
        with suppress(OSError):  # it has died, and ``news`` says of what
            self.connection.send(order)

    def news(self) -> str | Progress | Answer | None:
        """What it says next: a stage, a trial, what came of the goal; None when it has helped.

        Raises:
            EOFError: it has died.
            AutofitError: it cannot plan any goal.
        """
        try:
            said = self.connection.recv()
        except OSError as error:
            raise EOFError from error
        if isinstance(said, AutofitError):
            raise said
        assert isinstance(said, str | Progress | Answer | None)
        return said

    def end(self) -> str | None:
        self.connection.close()
        return super().end()

    def died_of(self) -> str:
        """A line about one that has died."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        return self.end() or f"the search on {self._device} ended early"

    def dismissed(self, reason: str) -> str:
        """End it; a line about it."""
        self.end()
        return f"the search on {self._device} ended early: {reason}"


def with_news(planners: Sequence[Planner]) -> list[Planner]:
    """Those that have something to say; waits until one has."""
    heard = wait([planner.connection for planner in planners])
    return [planner for planner in planners if planner.connection in heard]


def search_along(worker: Child) -> None:
    """What each who searches along runs: the ask and the word to begin come by its input."""
    ask: Any = pickle.load(sys.stdin.buffer)
    assert isinstance(ask, Ask)
    with session.measuring(ask.model, ask.device, ask.dtype, worker) as measurer:
        if not sys.stdin.buffer.read(1):
            return  # nobody plans any more
        threading.Thread(target=_end_with_planner, daemon=True).start()
        # The planner has made the dry run by now, and it is remembered on disk.
        foresight = Foresight(ask.model, ask.goal, ask.device, ask.dtype)
        help_search(measurer, ask.goal, ask.effort, defaults=ask.model, foresee=foresight.basis)


def plan_goals(worker: Child) -> None:
    """What a ``Planner``'s process runs: the ask comes by its input, goals by the connection."""
    ask: Any = pickle.load(sys.stdin.buffer)
    assert isinstance(ask, Ask)
    threading.Thread(target=_end_with_planner, daemon=True).start()
    with Connection(int(sys.argv[1])) as connection:
        try:
            with session.measuring(ask.model, ask.device, ask.dtype, worker) as measurer:
                _answer(connection, ask, measurer)
        except BadInput as error:  # of the question, and so for every other process too
            connection.send(error)
        except AutofitError as error:  # of this one: it has died, and the others go on
            sys.exit(str(error))


def _answer(connection: Connection, ask: Ask, measurer: Measurer) -> None:
    """Do what is ordered until the other end is closed."""
    listener = Listener(connection.send, connection.send)
    foresight = None
    with suppress(EOFError):
        while True:
            order = connection.recv()
            if order is None:
                continue  # the word to stop: it has stopped, or was done by itself
            assert isinstance(order, _Order)
            # as above: who asks has made the dry run by now
            foresight = foresight or Foresight(ask.model, ask.goal, ask.device, ask.dtype)
            about = measurer, order.goal, ask.effort.joined if order.resumes else ask.effort
            if order.helps:
                with _alone_at_fault():
                    help_search(
                        *about,
                        defaults=ask.model,
                        foresee=foresight.basis,
                        after=order.after,
                        is_over=connection.poll,
                    )
                connection.send(None)
                continue
            answer = answered(
                *about,
                listener=listener,
                defaults=ask.model,
                foresee=foresight.basis,
                after=order.after,
            )
            connection.send(answer)


@contextmanager
def _alone_at_fault() -> Iterator[None]:
    """Who plans what this one helps with may go on where this one cannot."""
    try:
        yield
    except AutofitError as error:
        sys.exit(str(error))


def _end_with_planner() -> None:
    """The planner holds the other end; when it is gone, however it went, this read returns."""
    os.read(sys.stdin.fileno(), 1)  # not by the buffer, whose lock Python needs to end the process
    os._exit(1)
