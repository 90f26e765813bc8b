"""Several budgets in one command: in which order, by whom, and what is told of each."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import worlds
from conftest import Pipes
from rich.console import Console
from samples import FAST, SLOW, device, measurement, profile
from test_cli import Ended, autofit
from test_team import measured_by

from autofit import session, store, team
from autofit.budgets import Budgets, Found
from autofit.goals import Goal
from autofit.planner import Answer, Planned
from autofit.search import Limits, Progress
from autofit.spec import AutofitError, BadInput, Measurement, NothingFits, Outcome, Slot
from autofit.trial import InProcess, Request, Subject
from autofit.units import MIB, parse_size

ASKED = ("plan", "tiny-sd", "--device", "cpu", "--trials", "1")
GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("budgets")
        patch.setenv("AUTOFIT_HOME", str(path))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield path


@dataclass
class Here:
    """Measures in this process in place of a worker's. Half precision takes a second longer, so
    that what wins is known. ``interrupt_at`` is the number of the trial at which Ctrl-C is pressed.
    """

    pipe: Any
    loaded: int = 0
    measured: int = 0
    interrupt_at: int | None = None

    @contextmanager
    def measuring(self, *_: Any) -> Iterator[InProcess]:
        outer = self

        class Counted(InProcess):
            def measure(self, request: Request) -> Outcome:
                outer.measured += 1
                if outer.measured == outer.interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)
                outcome = super().measure(request)
                if isinstance(outcome, Measurement) and request.plan.at(Slot.PRECISION):
                    return replace(outcome, image_s=outcome.image_s + 1)
                return outcome

        self.loaded += 1
        yield Counted(self.pipe, "cpu")


@contextmanager
def in_this_process(pipe: Any, **asked: Any) -> Iterator[Here]:
    here = Here(pipe, **asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "measuring", here.measuring)
        yield here


# ---------------------------------------------------------------- one device


BUDGETS = "6MiB,60MiB,1MiB,61440KiB,8MiB,2MiB"  # the second and the fourth are one


@pytest.fixture(scope="module")
def here(pipes: Pipes) -> Iterator[Here]:
    with in_this_process(pipes["tiny-sd"]) as here:
        yield here


@pytest.fixture(scope="module")
def planned(here: Here) -> Ended:
    return autofit(*ASKED, "--budget", BUDGETS, "--json")


@pytest.fixture(scope="module")
def entries(planned: Ended) -> list[dict[str, Any]]:
    found = json.loads(planned.out)
    assert isinstance(found, list)
    return found


class TestOneByOne:
    def test_the_model_is_loaded_once(self, planned: Ended, here: Here) -> None:
        assert here.loaded == 1

    def test_the_largest_budget_comes_first_and_none_twice(
        self, entries: list[dict[str, Any]], planned: Ended
    ) -> None:
        assert [e["budget_bytes"] / MIB for e in entries] == [60, 8, 6, 2, 1]
        heads = re.findall(r"^(\w+): ", planned.err, re.MULTILINE)
        assert list(dict.fromkeys(heads)) == ["60MiB", "8MiB", "6MiB", "2MiB", "1MiB", "autofit"]

    def test_what_was_tried_is_known_to_the_next(self, entries: list[dict[str, Any]]) -> None:
        more, less = entries[0]["trials"], entries[2]["trials"]
        shared = [trial for trial in less if trial in more]
        assert shared[0] == more[0]  # the reference, which is larger than 6 MiB
        assert len(shared) < len(less)

    def test_an_entry_is_what_one_budget_prints(self, entries: list[dict[str, Any]]) -> None:
        for entry in (entries[0], entries[2]):
            keys = "budget_bytes profile limit_s break_even trials pipeline device path plan_s"
            assert list(entry) == keys.split()
            kept = store.load(entry["path"])
            assert kept.budget_bytes == entry["budget_bytes"]
            assert kept.measured.verified
            assert kept.measured.peak_bytes <= entry["budget_bytes"]

    def test_what_fits_a_smaller_budget_serves_there(
        self, entries: list[dict[str, Any]], planned: Ended
    ) -> None:
        assert entries[1] == entries[0] | {"budget_bytes": 8 * MIB, "plan_s": 0}
        assert re.search(r"^8MiB: the plan for 60MiB needs 7\.\d+ MiB only", planned.err, re.M)

    def test_nothing_fits_and_below_that_nothing_is_tried(
        self, entries: list[dict[str, Any]], planned: Ended
    ) -> None:
        smallest = r"; the smallest needs 3\.\d+ MiB: try --budget \dMB"
        for entry, why in zip(
            entries[3:], (r"none of \d+ plans fits .+", "not tried"), strict=True
        ):
            assert re.fullmatch(why + smallest, entry["error"])
            assert 3 * MIB < entry["smallest_bytes"] < 6 * MIB
            assert "profile" not in entry
        assert planned.code == 3
        *_, last = planned.err.splitlines()
        assert re.fullmatch(rf"autofit: no plan for 2MiB, 1MiB{smallest}", last)
        assert not re.search(r"^1MiB: +\d", planned.err, re.M)

    def test_without_json_a_row_a_budget(
        self, entries: list[dict[str, Any]], home: Path, here: Here
    ) -> None:
        ended = autofit(*ASKED, "--budget", "60MiB,8MiB")
        assert ended.code == 0, ended.err
        assert "autofit:" not in ended.err
        head, more, served = ended.out.splitlines()
        assert re.split(" {2,}", head) == ["budget", "image", "peak", "plan", "profile"]
        name, seconds, peak, text, path = re.split(" {2,}", more)
        assert (name, peak) == ("60MiB", "7.17 MiB")
        assert re.fullmatch(r"[\d.]+ m?s", seconds)
        assert text.endswith("resident")
        assert Path(path).parent == home / "profiles"
        assert re.split(" {2,}", served) == ["8MiB", seconds, peak, f"{text}, as for 60MiB", path]

    def test_a_full_disk_is_told_after_what_was_found(
        self, entries: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: Planned) -> Path:
            raise BadInput("profile x: no space left on device")

        monkeypatch.setattr(session, "keep", full)
        ended = autofit(*ASKED, "--budget", "60MiB,8MiB", "--json")
        assert ended.code == 2
        assert [entry["path"] for entry in json.loads(ended.out)] == [None, None]
        assert ended.err.splitlines()[-1] == "autofit: profile x: no space left on device"


@pytest.mark.usefixtures("hears_interrupts")
def test_ctrl_c_keeps_what_was_found(pipes: Pipes, home: Path) -> None:
    """Pressed while the second budget is searched for."""
    asked = (*ASKED, "--steps", "3", "--budget", "60MiB,6MiB")
    with in_this_process(pipes["tiny-sd"], interrupt_at=3):
        ended = autofit(*asked)
    assert ended.code == 130
    assert ended.complaint == "interrupted; the same command resumes"
    assert "trials within 6.00 MiB" in ended.err
    (path,) = re.findall(r"^60MiB: profile (.+)$", ended.err, re.M)
    assert store.load(path).workload.steps == 3


# ---------------------------------------------------------------- several


@dataclass
class Watched:
    """The processes that are started, and the budgets that each begins."""

    planners: list[Any] = field(default_factory=list)
    begun: list[tuple[int, int, int | None]] = field(default_factory=list)
    helped: list[int] = field(default_factory=list)

    @property
    def gone(self) -> bool:
        return all(not psutil.pid_exists(p._process.pid) for p in self.planners)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched()

    class Planner(team.Planner):
        def __init__(self, *asked: Any) -> None:
            super().__init__(*asked)
            seen.planners.append(self)

        def begin(self, goal: Goal, after: Planned | None, resumes: bool) -> None:
            known = None if after is None else after.profile.budget_bytes // MIB
            seen.begun.append((self.number, goal.budget_bytes // MIB, known))
            super().begin(goal, after, resumes)

        def help(self, leader: team.Planner) -> None:
            assert leader.goal is not None
            seen.helped.append(leader.goal.budget_bytes // MIB)
            super().help(leader)

    monkeypatch.setattr(team, "Planner", Planner)
    return seen


def test_two_workers_plan_a_budget_each(watched: Watched) -> None:
    before = set(psutil.Process().children(recursive=True))
    asked = (*ASKED, "--steps", "2", "--workers", "2", "--json")
    ended = autofit(*asked, "--budget", "6MiB,60MiB,1MiB")
    assert ended.code == 3, ended.err
    more, less, none = json.loads(ended.out)
    for entry, size in ((more, 60), (less, 6)):
        assert store.load(entry["path"]).budget_bytes == entry["budget_bytes"] == size * MIB
    assert none["error"].startswith("none of ")
    assert watched.begun[:2] == [(0, 60, None), (1, 6, None)]
    assert watched.begun[2][1] == 1
    assert watched.begun[2][2] in (60, 6)
    assert "loading tiny-sd on cpu, cpu\n" in ended.err
    assert "warning:" not in ended.err
    assert re.search(r"^6MiB: +1 +[\d.]+ m?s ", ended.err, re.M)
    assert watched.gone
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
def test_who_has_no_budget_helps(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    asked = ("plan", "tiny-sd", "--device", "cpu", "--size", "128x128", "--workers", "3", "--json")
    ended = autofit(*asked, "--budget", "300MiB,1MiB")
    more, none = json.loads(ended.out)
    assert none["error"].startswith("none of ")
    assert watched.begun == [(0, 300, None), (1, 1, None)]
    assert watched.helped.count(300) >= 1
    assert "300MiB: one more searches along\n" in ended.err
    labels = [trial["label"] for trial in more["trials"]]
    assert len(set(labels)) == len(labels) >= 2
    assert len(measured_by(tmp_path)) == 3
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something done each time that one waits for what the processes say."""
    waiting = team.with_news

    def looked(do: Callable[[], None]) -> None:
        def with_news(busy: list[Any]) -> list[Any]:
            do()
            return waiting(busy)

        monkeypatch.setattr(team, "with_news", with_news)

    return looked


@pytest.mark.usefixtures("hears_interrupts")
def test_ctrl_c_ends_all_workers(watched: Watched, looked: Any) -> None:
    before = set(psutil.Process().children(recursive=True))
    looked(lambda: os.kill(os.getpid(), signal.SIGINT))
    ended = autofit(*ASKED, "--budget", "60MiB,6MiB,1MiB", "--workers", "2")
    assert ended.code == 130
    assert ended.complaint == "interrupted; the same command resumes"
    assert [budget for _, budget, _ in watched.begun] == [60, 6]
    assert watched.gone
    assert set(psutil.Process().children(recursive=True)) <= before


def test_workers_that_died_are_told_and_the_last_is_the_end(watched: Watched, looked: Any) -> None:
    def kill_all() -> None:
        for planner in watched.planners:
            planner._process.kill()
            planner._process.wait()

    looked(kill_all)
    ended = autofit(*ASKED, "--budget", "60MiB,6MiB,1MiB", "--workers", "2")
    assert ended.code == 1
    assert ended.complaint == "the search on cpu ended early: -9"
    assert ended.err.count("warning: the search on cpu ended early: -9\n") == 1
    assert watched.gone


class Scripted:
    """In place of a process: what the first is given fails, the others' budgets are planned."""

    begun: ClassVar[list[tuple[int, str, bool]]] = []
    helped: ClassVar[list[tuple[int, str]]] = []
    stopped: ClassVar[list[int]] = []
    ended: ClassVar[list[int]] = []

    def __init__(self, ask: team.Ask, number: int) -> None:
        self.number, self.goal = number, ask.goal

    def begin(self, goal: Goal, after: Planned | None, resumes: bool) -> None:
        self.goal = goal
        self.begun.append((self.number, str(goal.budget), resumes))

    def news(self) -> Answer:
        budget = str(self.goal.budget)
        if self.number == 0:
            return Answer(self.goal, error=AutofitError("the worker did not start"))
        return replace(found(budget, budget), goal=self.goal)

    def dismissed(self, reason: str) -> str:
        return f"ended early: {reason}"

    def help(self, leader: Any) -> None:
        self.goal = leader.goal
        self.helped.append((self.number, str(self.goal.budget)))

    def stop(self) -> None:
        self.stopped.append(self.number)

    def end(self) -> None:
        self.ended.append(self.number)


def test_a_device_at_fault_does_not_fail_the_others_budgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(team, "Planner", Scripted)
    monkeypatch.setattr(team, "with_news", lambda planners: planners[:1])
    monkeypatch.setattr(Scripted, "begun", [])
    budgets = ("--budget", "60MiB,6MiB,5MiB", "--workers", "2", "--fresh", "--json")
    ended = autofit(*ASKED, *budgets)
    assert ended.code == 0, ended.err
    assert Scripted.begun == [
        (0, "60MiB", False), (1, "6MiB", False), (1, "60MiB", True), (1, "5MiB", False),
    ]  # fmt: skip
    assert ended.err.count("warning: ended early: the worker did not start\n") == 1
    assert [entry["budget_bytes"] // MIB for entry in json.loads(ended.out)] == [60, 6, 5]


def test_what_was_found_is_told_also_where_the_rest_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(Scripted):
        def news(self) -> Answer:
            if len(self.begun) > 2:
                raise EOFError
            return replace(found("60MiB", "60MiB"), goal=self.goal)

        def died_of(self) -> str:
            return "the search on cpu ended early: -9"

    monkeypatch.setattr(team, "Planner", Dying)
    monkeypatch.setattr(team, "with_news", lambda planners: planners[:1])
    monkeypatch.setattr(Scripted, "begun", [])
    ended = autofit(*ASKED, "--budget", "60MiB,6MiB,5MiB", "--workers", "2", "--json")
    assert ended.code == 1
    assert ended.err.endswith("\nautofit: the search on cpu ended early: -9\n")
    assert [entry["budget_bytes"] // MIB for entry in json.loads(ended.out)] == [60]


class Puppet(Scripted):
    """Says what the test has it say; EOFError is its death."""

    script: ClassVar[list[tuple[int, Any]]] = []

    def news(self) -> Any:
        number, said = self.script.pop(0)
        assert number == self.number
        if said is EOFError:
            raise EOFError
        return replace(found(said, said), goal=self.goal) if str(said).endswith("MiB") else said

    def died_of(self) -> str:
        return f"{self.number} died"


@pytest.fixture
def puppets(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_news(planners: list[Any]) -> list[Any]:
        return [planner for planner in planners if planner.number == Puppet.script[0][0]]

    monkeypatch.setattr(team, "Planner", Puppet)
    monkeypatch.setattr(team, "with_news", with_news)
    for name in ("script", "begun", "helped", "stopped", "ended"):
        monkeypatch.setattr(Puppet, name, [])


TRIED = Progress(0, profile().plan, None, None, 0.0, Limits())


@pytest.mark.parametrize(
    ("script", "stopped", "ended"),
    [
        ([(0, TRIED), (1, "6MiB"), (0, TRIED), (0, "60MiB")], [1], [0, 1]),
        ([(0, TRIED), (1, "6MiB"), (0, "verifying"), (1, None), (0, "60MiB")], [1], [1, 0]),
        # It found nothing left to try, and is not sent there again.
        ([(1, "6MiB"), (0, TRIED), (1, None), (0, TRIED), (0, "60MiB")], [], [1, 0]),
        # Before the first trial the study may not be there yet.
        ([(1, "6MiB"), (0, "plans"), (0, TRIED), (0, "verifying"), (0, "60MiB")], [1, 1], [0, 1]),
        # It has died.
        ([(0, TRIED), (1, "6MiB"), (1, EOFError), (0, TRIED), (0, "60MiB")], [], [0]),
    ],
)
def test_who_is_done_helps(
    script: list[Any], stopped: list[int], ended: list[int], puppets: None
) -> None:
    Puppet.script += script
    told = autofit(*ASKED, "--budget", "60MiB,6MiB", "--workers", "2", "--fresh", "--json")
    assert told.code == 0, told.err
    assert Puppet.script == []
    assert Puppet.begun == [(0, "60MiB", False), (1, "6MiB", False)]
    assert Puppet.helped == [(1, "60MiB")]
    assert (Puppet.stopped, Puppet.ended) == (stopped, ended)
    assert [entry["budget_bytes"] // MIB for entry in json.loads(told.out)] == [60, 6]


def test_who_helps_is_called_back_for_what_nobody_plans_any_more(puppets: None) -> None:
    Puppet.script += [(0, TRIED), (1, TRIED), (2, "5MiB"), (1, EOFError), (2, None), (0, "60MiB")]
    Puppet.script += [(2, "6MiB")]
    asked = ("--budget", "60MiB,6MiB,5MiB", "--workers", "3", "--fresh", "--json")
    told = autofit(*ASKED, *asked)
    assert told.code == 0, told.err
    assert Puppet.helped == [(2, "60MiB")]
    assert Puppet.stopped == [2]
    assert Puppet.begun[3:] == [(2, "6MiB", True)]
    assert "warning: 1 died\n" in told.err


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
def test_the_budget_of_one_that_died_is_for_the_others(
    watched: Watched, looked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And Ctrl-C keeps what they found meanwhile."""
    before = set(psutil.Process().children(recursive=True))
    told: list[Answer] = []
    telling = Budgets.tell

    def kill_one() -> None:
        if not told:
            watched.planners[0]._process.kill()  # while it loads

    def tell(budgets: Budgets, answer: Answer) -> None:
        telling(budgets, answer)
        told.append(answer)
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    looked(kill_one)
    monkeypatch.setattr(Budgets, "tell", tell)
    ended = autofit(*ASKED, "--steps", "5", "--workers", "2", "--budget", "60MiB,6MiB,1MiB")
    assert ended.code == 130
    assert ended.complaint == "interrupted; the same command resumes"
    assert "warning: the search on cpu ended early: -9" in ended.err
    assert watched.begun == [(0, 60, None), (1, 6, None), (1, 60, None)]
    paths = re.findall(r"^\d+MiB: profile (.+)$", ended.err, re.M)
    assert [store.load(path).budget_bytes for path in paths] == [6 * MIB, 60 * MIB]
    assert watched.gone
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
def test_what_no_process_can_plan_is_one_line(watched: Watched) -> None:
    ended = autofit(*ASKED, "--size", "65x64", "--workers", "2", "--budget", "8GB,4GB")
    assert ended.code == 2
    assert ended.complaint.startswith("size 65x64: ")
    assert watched.gone


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8GB,,4GB",), r"budget '8GB,,4GB': one of the list is empty; write .+ 8GB,4GB"),
        (("8GB,",), r"budget '8GB,': one of the list is empty; .+"),
        (("8GB,foo",), r"budget 'foo': not a number with a unit; write .+"),
        (("8GB,4",), r"budget '4' has no unit; .+"),
        (("8GB,0GB",), r"budget '0GB' is not above zero; .+"),
        (("8GB,4GB", "--output", "x.yaml"), r"output 'x\.yaml' is for one budget, .+"),
        (("8GB,4GB", "--workers", "0"), r"workers 0 is below 1; .+"),
        (("8GB,4GB", "--storage", "nonsense"), r"storage 'nonsense': .+"),
        (("8GB,4GB", "--dry-run"), r"budget '8GB,4GB' is several: .+ --budgets 8GB,4GB"),
        (("8GB,4GB", "--sizes", "64x64"), r"budget '8GB,4GB' is several: .+"),
        (("8GB,4GB", "--budgets", "8GB"), r"give --budget or --budgets, not both"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    ended = autofit(*ASKED, "--budget", *arguments)
    assert ended.code == 2
    assert re.fullmatch(message, ended.complaint), ended.complaint
    assert len(ended.err.splitlines()) == 1


def test_an_unknown_model_is_found_out_before_a_process_is_started(watched: Watched) -> None:
    ended = autofit("plan", "tiny-ds", *ASKED[2:], "--budget", "8GB,4GB", "--workers", "2")
    assert ended.code == 2
    assert "Did you mean tiny-sd?" in ended.complaint
    assert watched.planners == []


# ---------------------------------------------------------------- the order


def found(budget: str, peak: str, image_s: float = 1.0, warmup_s: float = 1.0) -> Answer:
    measured = measurement(peak_bytes=parse_size(peak), image_s=image_s, warmup_s=warmup_s)
    made = profile(budget_bytes=parse_size(budget), measured=measured)
    subject = Subject(worlds.SDXL, device())
    return Answer(Goal(budget), Planned(made, (), (), subject, Path("reference.npz")))


class Asked:
    """Budgets, and what is heard of them."""

    def __init__(self, *asked: str) -> None:
        self.heard: list[Answer] = []
        self.budgets = Budgets([Goal(budget) for budget in asked], 20, self.heard.append)

    def next(self) -> str | None:
        goal = self.budgets.next()
        return None if goal is None else str(goal.budget)

    def after(self, budget: str) -> int | None:
        known = self.budgets.after(Goal(budget))
        return None if known is None else known.profile.budget_bytes // GIB


def test_who_is_done_takes_the_largest_that_nobody_has_begun() -> None:
    asked = Asked("4GiB", "12GiB", "6GiB", "8GiB")
    assert [asked.next(), asked.next()] == ["12GiB", "8GiB"]
    assert asked.after("8GiB") is None
    asked.budgets.tell(found("8GiB", "7.9GiB"))
    assert (asked.next(), asked.after("6GiB")) == ("6GiB", 8)
    asked.budgets.tell(found("12GiB", "11GiB"))
    assert (asked.next(), asked.after("4GiB")) == ("4GiB", 8)
    assert asked.next() is None


def test_what_was_put_back_is_next_and_knows_of_larger_budgets_only() -> None:
    asked = Asked("12GiB", "8GiB", "6GiB")
    first, second = asked.budgets.next(), asked.budgets.next()
    assert first is not None
    assert second is not None
    asked.budgets.tell(found("8GiB", "7GiB"))
    asked.budgets.put_back(first)
    assert (asked.next(), asked.after("12GiB")) == ("12GiB", None)
    assert asked.next() == "6GiB"


def test_of_the_plans_that_fit_the_fastest_serves() -> None:
    asked = Asked("12GiB", "8GiB", "6GiB", "5GiB")
    assert [asked.next(), asked.next()] == ["12GiB", "8GiB"]
    asked.budgets.tell(found("12GiB", "5.5GiB", image_s=1.0))
    asked.budgets.tell(found("8GiB", "5GiB", image_s=1.1))
    assert asked.next() is None
    served = [a.planned.profile.budget_bytes // GIB for a in asked.heard if a.planned]
    assert served == [12, 8, 12, 12, 8]


def budgets_of(asked: Asked) -> list[tuple[str, int, float]]:
    """What was heard: for which budget, and the budget and seconds of the plan's profile."""
    profiles = [(str(a.goal.budget), a.planned.profile) for a in asked.heard if a.planned]
    return [(name, p.budget_bytes // GIB, p.measured.image_s) for name, p in profiles]


def test_a_faster_plan_for_less_memory_is_that_for_more_too() -> None:
    """For the largest budget that it is faster for, and it serves below."""
    asked = Asked("16GiB", "12GiB", "8GiB", "6GiB")
    assert [asked.next(), asked.next()] == ["16GiB", "12GiB"]
    asked.budgets.tell(found("16GiB", "15GiB", image_s=1.3))
    asked.budgets.tell(found("12GiB", "7GiB", image_s=1.2))
    del asked.heard[:]  # of 12 GiB for 16 GiB, and for itself
    assert asked.next() == "6GiB"
    asked.budgets.tell(found("6GiB", "5GiB", image_s=1.0))
    assert budgets_of(asked) == [
        ("8GiB", 12, 1.2),
        ("6GiB", 6, 1.0),
        *(("16GiB", 16, 1.0), ("12GiB", 16, 1.0), ("8GiB", 16, 1.0)),
    ]


def test_a_faster_plan_that_fits_less_serves_there_however_late_it_comes() -> None:
    asked = Asked("12GiB", "8GiB")
    assert [asked.next(), asked.next()] == ["12GiB", "8GiB"]
    asked.budgets.tell(found("8GiB", "7GiB", image_s=1.1))
    asked.budgets.tell(found("12GiB", "6GiB", image_s=1.0))
    assert budgets_of(asked) == [("8GiB", 8, 1.1), ("12GiB", 12, 1.0), ("8GiB", 12, 1.0)]


@pytest.mark.parametrize(("image_s", "warmup_s"), [(0.99, 1.0), (0.9, 4.0), (1.0, 0.1)])
def test_a_plan_that_is_not_clearly_faster_takes_no_budget(image_s: float, warmup_s: float) -> None:
    """Within the noise, by its set-up, or by its set-up alone."""
    asked = Asked("12GiB", "8GiB")
    assert [asked.next(), asked.next()] == ["12GiB", "8GiB"]
    asked.budgets.tell(found("12GiB", "11GiB", image_s=1.0, warmup_s=1.0))
    asked.budgets.tell(found("8GiB", "7GiB", image_s=image_s, warmup_s=warmup_s))
    assert budgets_of(asked) == [("12GiB", 12, 1.0), ("8GiB", 8, image_s)]


def test_the_clearly_faster_one_is_taken_though_another_is_nearly_so() -> None:
    """What needs no set-up is the better plan, but `apply` would take the faster."""
    asked = Asked("16GiB", "8GiB", "6GiB")
    assert [asked.next() for _ in range(3)] == ["16GiB", "8GiB", "6GiB"]
    asked.budgets.tell(found("8GiB", "7GiB", image_s=0.9, warmup_s=4.0))
    asked.budgets.tell(found("6GiB", "5GiB", image_s=0.99, warmup_s=0.1))
    asked.budgets.tell(found("16GiB", "15GiB", image_s=1.0, warmup_s=4.0))
    assert budgets_of(asked)[-1] == ("16GiB", 16, 0.9)


def test_what_another_found_raised_is_not_known_where_it_was_not_tried() -> None:
    """A budget that its planner lost begins with what was tried for more memory."""
    asked = Asked("12GiB", "8GiB", "6GiB")
    goals = [asked.budgets.next() for _ in range(3)]
    assert goals[1] is not None
    asked.budgets.tell(found("6GiB", "5GiB", image_s=1.0))
    asked.budgets.tell(found("12GiB", "11GiB", image_s=2.0))
    asked.budgets.put_back(goals[1])
    known = asked.budgets.after(goals[1])
    assert known is not None
    assert known.profile.measured.image_s == 2.0


def test_below_the_smallest_that_works_nothing_is_searched_for() -> None:
    asked = Asked("8GiB", "6GiB", "4GiB")
    goal = asked.budgets.next()
    assert goal is not None
    asked.budgets.tell(Answer(goal, error=NothingFits("too little", 5 * GIB)))
    assert asked.next() == "6GiB"
    assert asked.next() is None
    assert str(asked.heard[-1].error) == (
        "not tried; the smallest needs 5.00 GiB: try --budget 5477MB"
    )


def test_a_search_that_failed_is_a_fault_and_not_a_budget_too_small(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = Found(Console(stderr=True, width=200))
    told.add(Answer(Goal("6GB"), error=NothingFits("nothing fits")))
    with pytest.raises(NothingFits, match=r"^no plan for 6GB$"):
        told.check()
    told.add(Answer(Goal("8GB"), error=AutofitError("every trial failed [x]")))
    assert told.entries() == [
        {"budget_bytes": 8 * 10**9, "error": "every trial failed [x]", "smallest_bytes": None},
        {"budget_bytes": 6 * 10**9, "error": "nothing fits", "smallest_bytes": None},
    ]
    assert told.table().splitlines() == [
        "budget  image  peak  plan  profile",
        "8GB     -      -     every trial failed [x]",
        "6GB     -      -     nothing fits",
    ]
    with pytest.raises(AutofitError, match=r"^no plan for 8GB, 6GB: every trial failed") as ended:
        told.check()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "6GB: nothing fits\n8GB: every trial failed [x]\n"


def test_what_another_budget_found_is_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    told = Found(Console(stderr=True, width=200))
    budgets = Budgets([Goal("12GiB"), Goal("6GiB")], 20, told.add)
    budgets.tell(found("12GiB", "11GiB", image_s=3.0))
    budgets.tell(found("6GiB", "5GiB", image_s=2.0))
    rows = [line.split() for line in told.table().splitlines()[1:]]
    assert [(row[0], " ".join(row[1:3])) for row in rows] == [("12GiB", "2 s"), ("6GiB", "2 s")]
    profiles = [store.load(row[-1]) for row in rows]
    assert [(p.budget_bytes // GIB, p.measured.image_s) for p in profiles] == [(12, 2.0), (6, 2.0)]
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "faster" in line)
    assert said == f"12GiB: the plan for less memory is faster: profile {rows[0][-1]}"


def test_who_serves_is_named_while_it_is_the_plan_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the file that is shown has the plan that is shown."""
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    told = Found(Console(stderr=True, width=200))
    budgets = Budgets([Goal(budget) for budget in ("16GiB", "12GiB", "8GiB")], 20, told.add)
    assert [budgets.next() for _ in range(2)]
    budgets.tell(found("16GiB", "7GiB", image_s=1.2))
    assert budgets.next() is None
    assert told.table().splitlines()[2].split()[0] == "8GiB"
    assert ", as for 16GiB" in told.table().splitlines()[2]
    late = found("12GiB", "11GiB", image_s=1.0)
    assert late.planned is not None
    other = replace(late.planned, profile=replace(late.planned.profile, plan=SLOW))
    budgets.tell(replace(late, planned=other))
    rows = told.table().splitlines()[1:]
    shown = [store.load(row.split()[-1]) for row in rows]
    assert [(p.budget_bytes // GIB, p.plan) for p in shown] == [(16, SLOW), (12, SLOW), (16, FAST)]
    assert ["as for" in row for row in rows] == [False, False, False]
    assert "8GiB: the plan for 16GiB needs 7.00 GiB only: it serves" in capsys.readouterr().err


def test_of_a_better_plan_that_cannot_be_kept_no_file_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    told = Found(Console(stderr=True, width=200))
    budgets = Budgets([Goal("12GiB"), Goal("6GiB")], 20, told.add)
    budgets.tell(found("12GiB", "11GiB", image_s=3.0))

    def full(planned: Planned) -> Path:
        raise BadInput("no room")

    monkeypatch.setattr(session, "keep", full)
    late = found("6GiB", "5GiB", image_s=2.0)
    assert late.planned is not None
    other = replace(late.planned, profile=replace(late.planned.profile, plan=SLOW))
    budgets.tell(replace(late, planned=other))
    assert [entry["path"] for entry in told.entries()] == [None, None]
    with pytest.raises(BadInput, match="no room"):
        told.check()


def test_an_answer_comes_whole_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(NothingFits("too little", 5)))
    assert (type(error), str(error), error.smallest_bytes) == (NothingFits, "too little", 5)
