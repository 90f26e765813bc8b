"""What `autofit plan` does with several budgets: the largest first, each informed by one before.

One device plans them one by one, and loads the model once. Of several, each takes the next that is
not begun, in a process of its own; where all are begun, it helps to search for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from autofit import commands, host, report, session, team
from autofit.child import Child
from autofit.commands import Listeners
from autofit.foresight import Foresight
from autofit.goals import Goal, too_little
from autofit.planner import Answer, Effort, Interrupted, Listener, Planned, answered
from autofit.probe import device_named
from autofit.sampler import clearly_faster
from autofit.search import Progress
from autofit.spec import AutofitError, BadInput, Measurement, NothingFits, Plan
from autofit.units import format_bytes, format_seconds


def plan(
    model: str,
    goals: Sequence[Goal],
    effort: Effort,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    workers: int = 1,
    child: Child | None = None,
) -> None:
    """Plan goals that differ in their budgets only; a profile is kept as soon as it is found.
    ``child`` is the process of the only worker, where it runs already.

    Raises:
        NothingFits: there is a budget without a plan. The others are shown.
    """
    console = commands.stderr_console()
    target = device or session.default_device()
    device_named(target)  # found out before the model is loaded, as are the others below
    session.check_model(model)
    effort.check()
    found = Found(console)
    budgets = Budgets(goals, effort.images, found.add)
    devices = team.devices(target, workers)
    asks = [team.Ask(model, budgets.waiting[0], effort, d, dtype) for d in devices]
    with (
        found.told(as_json),
        host.granted(goals[0].host_ram_bytes),
        host.shared(len(asks)),
        commands.interruptible(console),
        commands.watched(console, len(asks)) as listeners,
    ):
        if device is None and target == "cpu":
            console.print(commands.NO_CARD)
        console.print(f"loading {model} on {', '.join(devices)}", markup=False)
        foresight = Foresight(model, goals[0], target, dtype)
        if len(asks) == 1:
            _one_by_one(asks[0], child, budgets, foresight, listeners)
        else:
            with closing(_Crew(asks, budgets, listeners, console)) as crew:
                foresight.wait()  # else each would make its own
                crew.work()
    found.check()


def _one_by_one(
    ask: team.Ask,
    child: Child | None,
    budgets: Budgets,
    foresight: Foresight,
    listeners: Listeners,
) -> None:
    with session.measuring(ask.model, ask.device, ask.dtype, child) as measurer:
        while (goal := budgets.next()) is not None:
            answer = answered(
                measurer,
                goal,
                ask.effort,
                listener=listeners(0, _head(goal)),
                defaults=ask.model,
                foresee=foresight.basis,
                after=budgets.after(goal),
            )
            budgets.tell(answer)


class _Crew:
    """Processes that take the next budget as each is done with one, or help others with theirs."""

    def __init__(
        self,
        asks: Sequence[team.Ask],
        budgets: Budgets,
        listeners: Listeners,
        console: Console,
    ) -> None:
        self._budgets, self._listeners, self._console = budgets, listeners, console
        self._idle = [team.Planner(ask, number) for number, ask in enumerate(asks)]
        self._busy: list[team.Planner] = []
        self._helping: list[team.Planner] = []
        # Of the busy, those whose studies have begun and are not known to be over.
        self._searching: list[team.Planner] = []
        self._exhausted: list[Goal] = []  # whose helpers found nothing left to try

    @property
    def _all(self) -> list[team.Planner]:
        return self._idle + self._busy + self._helping

    def work(self) -> None:
        """Until every budget has its answer.

        Raises:
            AutofitError: no process is left.
        """
        self._begin()
        while self._busy or self._budgets.waiting:
            for planner in team.with_news(self._busy + self._helping):
                self._hear(planner)
            self._begin()

    def close(self) -> None:
        for planner in self._all:
            planner.end()

    def _begin(self) -> None:
        while self._idle and (goal := self._budgets.next()) is not None:
            planner = self._idle.pop(0)
            planner.begin(goal, self._budgets.after(goal), self._budgets.was_begun(goal))
            self._busy.append(planner)
        while self._idle and self._searching:
            leader = min(self._searching, key=lambda planner: len(self._helpers(planner)))
            helper = self._idle.pop(0)
            helper.help(leader)
            self._helping.append(helper)
            self._listener(helper).stage("one more searches along")

    def _hear(self, planner: team.Planner) -> None:
        try:
            news = planner.news()
        except EOFError:
            self._lose(planner, planner.died_of())
            return
        if isinstance(news, Progress):
            self._listener(planner).progress(news)
            if planner not in self._searching and planner.goal not in self._exhausted:
                self._searching.append(planner)
        elif news is None:
            self._leave(planner)
        else:  # its search has not begun, or is over
            self._recall(self._helpers(planner))
            self._searching = [p for p in self._searching if p is not planner]
            if isinstance(news, str):
                self._listener(planner).stage(news)
            else:
                self._take(planner, news)

    def _leave(self, helper: team.Planner) -> None:
        """It has nothing left to try, or was recalled."""
        self._helping.remove(helper)
        self._idle.append(helper)
        assert helper.goal is not None
        self._exhausted.append(helper.goal)
        self._searching = [p for p in self._searching if p.goal != helper.goal]

    def _recall(self, helpers: Sequence[team.Planner]) -> None:
        """They come as soon as their trials are over."""
        for helper in helpers:
            helper.stop()

    def _take(self, planner: team.Planner, answer: Answer) -> None:
        if _is_fault(answer) and len(self._all) > 1:
            self._lose(planner, planner.dismissed(str(answer.error)))
            return
        self._forget(planner)
        self._idle.append(planner)
        self._budgets.tell(answer)

    def _lose(self, planner: team.Planner, fault: str) -> None:
        """What it was at is for the others to do."""
        leads = planner in self._busy
        self._forget(planner)
        if not self._all:
            raise AutofitError(fault)
        self._console.print(f"warning: {fault}", style="yellow", markup=False)
        if leads:
            assert planner.goal is not None
            self._budgets.put_back(planner.goal)
            if not self._idle:
                self._recall(self._helping[-1:])

    def _forget(self, planner: team.Planner) -> None:
        for part in (self._busy, self._helping, self._searching):
            if planner in part:
                part.remove(planner)

    def _helpers(self, leader: team.Planner) -> list[team.Planner]:
        return [planner for planner in self._helping if planner.goal == leader.goal]

    def _listener(self, planner: team.Planner) -> Listener:
        assert planner.goal is not None
        return self._listeners(planner.number, _head(planner.goal))


def _is_fault(answer: Answer) -> bool:
    """Whether it may be the device that is at fault and not the budget: another may do."""
    error = answer.error
    return error is not None and getattr(error, "smallest_bytes", None) is None


# ---------------------------------------------------------------- which is next


class Budgets:
    """Goals that wait, the largest budget first, and what came of the others. One budget is
    planned for once, however often and in whatever unit it is given; its answer is heard again
    where a plan for another budget turns out to be faster and fits."""

    def __init__(self, goals: Sequence[Goal], images: int, heard: Callable[[Answer], None]) -> None:
        different = {goal.budget_bytes: goal for goal in reversed(goals)}
        self.waiting = [different[size_bytes] for size_bytes in sorted(different, reverse=True)]
        self._images, self._heard = images, heard
        self._answers: dict[int, Answer] = {}  # by the budget
        self._told: list[Planned] = []  # for what they were searched for
        self._begun: set[int] = set()  # by one who could not end it

    def next(self) -> Goal | None:
        """The next to search for. Those before it that need no search are answered."""
        while self.waiting:
            goal = self.waiting.pop(0)
            answer = self._served(goal) or self._hopeless(goal)
            if answer is None:
                return goal
            self.tell(answer)
        return None

    def tell(self, answer: Answer) -> None:
        self._answers[answer.goal.budget_bytes] = answer
        if answer.planned is not None:
            self._told.append(answer.planned)
        self._heard(answer)
        for budget_bytes in sorted(self._answers, reverse=True):
            new = self._bettered(self._answers[budget_bytes])
            if new is not None:
                self._answers[budget_bytes] = new
                self._heard(new)

    def _bettered(self, answer: Answer) -> Answer | None:
        """One with the fastest plan that fits the budget, and the trials of the search that found
        it, where its own is clearly slower. What failed stays a fault."""
        own, room_bytes = answer.planned, answer.goal.budget_bytes
        if own is None:
            return None
        every = [a.planned for a in self._answers.values() if a.planned is not None]
        fits = [p for p in every if _measured(p).peak_bytes <= room_bytes]
        fits.sort(key=lambda p: p.profile.budget_bytes, reverse=True)  # of equals, who serves
        best = clearly_faster(_measured(own), fits, _measured, self._images)
        if best is None:
            return None
        raised_bytes = max(best.profile.budget_bytes, room_bytes)
        profile = replace(best.profile, budget_bytes=raised_bytes)
        return replace(answer, planned=replace(best, profile=profile))

    def put_back(self, goal: Goal) -> None:
        """One that ``next`` gave, to be given again."""
        self._begun.add(goal.budget_bytes)
        self.waiting.insert(0, goal)
        self.waiting.sort(key=lambda goal: goal.budget_bytes, reverse=True)

    def was_begun(self, goal: Goal) -> bool:
        return goal.budget_bytes in self._begun

    def after(self, goal: Goal) -> Planned | None:
        """What was planned for the next larger budget: what was tried there is known here."""
        return min(self._larger(goal), key=lambda p: p.profile.budget_bytes, default=None)

    def _served(self, goal: Goal) -> Answer | None:
        """A plan for more memory that needs no more than this: a search would find no other."""
        fits = [
            planned
            for planned in self._larger(goal)
            if planned.profile.measured.peak_bytes <= goal.budget_bytes
        ]
        best = min(fits, key=lambda p: p.profile.measured.image_s, default=None)
        return None if best is None else Answer(goal, best)

    def _hopeless(self, goal: Goal) -> Answer | None:
        smallest_bytes = _smallest_bytes(self._answers.values())
        if goal.budget_bytes >= smallest_bytes:
            return None
        return Answer(goal, error=too_little("not tried", smallest_bytes))

    def _larger(self, goal: Goal) -> list[Planned]:
        return [p for p in self._told if p.profile.budget_bytes > goal.budget_bytes]


def _measured(planned: Planned) -> Measurement:
    return planned.profile.measured


def _smallest_bytes(answers: Iterable[Answer]) -> int:
    """The least that works, as far as budgets were too small to find out; else 0."""
    errors = (a.error for a in answers if isinstance(a.error, NothingFits))
    return max((error.smallest_bytes or 0 for error in errors), default=0)


# ---------------------------------------------------------------- what is shown


class Found:
    """The answers. What is planned is kept as it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._answers: dict[int, Answer] = {}  # by the budget, the largest first
        self._paths: dict[tuple[int, Plan], Path] = {}  # by the budget that it is kept for
        self._unkept: BadInput | None = None

    def add(self, answer: Answer) -> None:
        """One, or another for a budget that had one."""
        budget_bytes = answer.goal.budget_bytes
        is_first = budget_bytes not in self._answers
        answers = self._answers | {budget_bytes: answer}
        self._answers = {size_bytes: answers[size_bytes] for size_bytes in sorted(answers)[::-1]}
        planned = answer.planned
        if planned is None:
            self._say(answer, str(answer.error))
        elif not _is_served(answer, planned):
            self._keep(planned)
            if is_first:
                commands.print_trials(self._console, planned, answer.took_s)
            taken = "" if is_first else "the plan for less memory is faster: "
            self._say(answer, f"{taken}profile {self._path(planned)}")
        else:
            peak = format_bytes(planned.profile.measured.peak_bytes)
            holder = self._holder(planned) or "more memory"
            self._say(answer, f"the plan for {holder} needs {peak} only: it serves")

    @contextmanager
    def told(self, as_json: bool) -> Iterator[None]:
        """Print the answers at the end, also of a failure; Ctrl-C comes at no answer's time."""
        try:
            yield
        except Interrupted:
            raise
        except AutofitError:
            if self._answers:
                self._print(as_json)
            raise
        self._print(as_json)

    def _print(self, as_json: bool) -> None:
        print(json.dumps(self.entries(), indent=2) if as_json else self.table())

    def check(self) -> None:
        """Raise what the command ends with, where not all is well.

        Raises:
            BadInput: a profile could not be kept.
            AutofitError: the search for a budget failed.
            NothingFits: there is a budget without a plan.
        """
        if self._unkept is not None:
            raise self._unkept
        failed = [answer for answer in self._answers.values() if answer.error is not None]
        if not failed:
            return
        what = f"no plan for {', '.join(_name(answer.goal) for answer in failed)}"
        for answer in failed:
            if not isinstance(answer.error, NothingFits):
                raise AutofitError(f"{what}: {answer.error}")
        smallest_bytes = _smallest_bytes(failed)
        raise too_little(what, smallest_bytes) if smallest_bytes else NothingFits(what)

    def entries(self) -> list[dict[str, Any]]:
        """What ``--json`` prints: of each budget what it would print of that one alone, or why it
        has no plan. The profile may be one for a larger budget."""
        return [self._entry(answer) for answer in self._answers.values()]

    def table(self) -> str:
        """A row a budget: its plan and where the profile is, or why there is none."""
        rows = [
            ("budget", "image", "peak", "plan", "profile"),
            *map(self._row, self._answers.values()),
        ]
        widths = [max(len(row[column]) for row in rows if row[4]) for column in range(4)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)

    def _row(self, answer: Answer) -> tuple[str, str, str, str, str]:
        planned = answer.planned
        if planned is None:
            return _name(answer.goal), "-", "-", str(answer.error), ""
        measured, text = planned.profile.measured, report.plan_text(planned.profile.plan)
        if _is_served(answer, planned) and (holder := self._holder(planned)):
            text += f", as for {holder}"
        seconds, peak = format_seconds(measured.image_s), format_bytes(measured.peak_bytes)
        return _name(answer.goal), seconds, peak, text, str(self._path(planned) or "-")

    def _entry(self, answer: Answer) -> dict[str, Any]:
        entry: dict[str, Any] = {"budget_bytes": answer.goal.budget_bytes}
        if answer.planned is not None:
            path = self._path(answer.planned)
            return entry | commands.found_json(answer.planned, path, answer.took_s)
        smallest_bytes = getattr(answer.error, "smallest_bytes", None)
        return entry | {"error": str(answer.error), "smallest_bytes": smallest_bytes}

    def _keep(self, planned: Planned) -> None:
        try:
            self._paths[_key(planned)] = session.keep(planned)
        except BadInput as error:  # a disk that is full by now: the other budgets are planned
            self._unkept = error

    def _path(self, planned: Planned) -> Path | None:
        return self._paths.get(_key(planned))

    def _holder(self, planned: Planned) -> str | None:
        """The budget, as it was written, that a plan is kept for; None where that has another."""
        holder = self._answers.get(planned.profile.budget_bytes)
        if holder is None or holder.planned is None or _key(holder.planned) != _key(planned):
            return None
        return _name(holder.goal)

    def _say(self, answer: Answer, text: str) -> None:
        self._console.print(f"{_head(answer.goal)}{text}", markup=False, soft_wrap=True)


def _key(planned: Planned) -> tuple[int, Plan]:
    return planned.profile.budget_bytes, planned.profile.plan


def _is_served(answer: Answer, planned: Planned) -> bool:
    return planned.profile.budget_bytes != answer.goal.budget_bytes


def _name(goal: Goal) -> str:
    return str(goal.budget)


def _head(goal: Goal) -> str:
    """Before each line about a budget."""
    return f"{_name(goal)}: "
