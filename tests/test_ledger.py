"""Studies that several processes search at once, as they come out where nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from worlds import CARD, LARGE, SDXL, World, gib

from autofit import ledger, studies
from autofit.ledger import Ledger
from autofit.planner import Effort
from autofit.sampler import PlanSampler, Task, best_attempt
from autofit.search import Found, Limits, search
from autofit.spec import BadInput, Measurement, Outcome, Plan
from autofit.techniques.space import legal_plans

PLANS = legal_plans(SDXL, CARD, LARGE)
TASK = Task(PLANS, SDXL, CARD, LARGE, gib(6))
FEW = Task(PLANS[::5], SDXL, CARD, LARGE, gib(6))
ROOT = Path(__file__).parent.parent
TRIAL_S = 0.05
# Debian keeps the server's programs off the PATH.
SERVERS = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None]


def stored(where: str | Path) -> Any:
    """A database by its URL, else a journal."""
    if "://" in str(where):
        return studies.storage(str(where), "s")
    return optuna.storages.JournalStorage(JournalFileBackend(str(where)))


def opened(where: str | Path, name: str = "s") -> Ledger:
    return Ledger(stored(where), name, PlanSampler(TASK))


class Slow(World):
    """A world in which a trial takes a while."""

    def measure(self, plan: Plan, give_up_s: float | None) -> Outcome:
        time.sleep(TRIAL_S)
        return super().measure(plan, give_up_s)


def part_of(world: World, where: str | Path, name: str) -> Found:
    """One process's part in a study."""
    limits = Limits(trials=30)
    return search(TASK, world.measure, storage=stored(where), name=name, limits=limits)


def check(calls: list[list[str]], known: list[set[str]], bests: list[float]) -> None:
    """By process: the plans that it measured, those that it knows of, and the best of these."""
    flat = list(chain(*calls))
    assert len(set(flat)) == len(flat)  # no two measured one plan
    assert all(calls)
    # Who sees nothing worth a trial while nobody is at one leaves; the last to leave knows all.
    assert max(known, key=len) == set(flat)
    alone = best_s(search(TASK, World(gib(6)).measure))
    assert all(best <= 1.25 * alone for best in bests)


def best_s(found: Found) -> float:
    best = best_attempt(found.attempts, TASK)
    assert best is not None
    assert isinstance(best.outcome, Measurement)
    return TASK.objective_s(best.outcome)


def labels(found: Found) -> set[str]:
    return {attempt.plan.label for attempt in found.attempts}


def test_three_share_the_trials(tmp_path: Path) -> None:
    worlds = [Slow(gib(6)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        founds = list(pool.map(lambda world: part_of(world, tmp_path / "study", "s"), worlds))
    calls = [[plan.label for plan in world.calls] for world in worlds]
    check(calls, [labels(found) for found in founds], [best_s(found) for found in founds])


def test_of_two_who_claim_a_plan_at_once_the_first_has_it(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "study"), opened(tmp_path / "study")
    with first.claimed(PLANS[0]) as one:
        assert one is not None
        with second.claimed(PLANS[0]) as two:
            assert two is None
        first.catch_up()
        assert not first.others_at_work
        second.catch_up()
        assert second.others_at_work
        with second.claimed(PLANS[1]) as other:
            assert other is not None


def test_a_claim_that_measured_nothing_is_free_again(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "study"), opened(tmp_path / "study")
    with pytest.raises(ZeroDivisionError), first.claimed(PLANS[0]):
        _ = 1 / 0
    second.catch_up()
    assert not second.others_at_work
    with second.claimed(PLANS[0]) as trial:
        assert trial is not None


# Processes say what they have to on one line, and wait for one.
KILLED = """
with opened({where!r}, "killed").claimed(PLANS[0]):
    said("at it")
"""
ENDING = """
from autofit.spec import Attempt
mine = opened({where!r}, "killed")
with mine.claimed(PLANS[0]) as trial:
    trial.study.tell = lambda *_, **__: said("kept")
    mine.tell(trial, Attempt(PLANS[0], World(gib(6)).measure(PLANS[0], None)))
"""
SHARING = """
world = Slow(gib(6))
said("ready")
found = part_of(world, {where!r}, "shared")
said([plan.label for plan in world.calls], sorted(labels(found)), best_s(found))
"""
LEAVING = """
class Hanging(World):
    def measure(self, plan, give_up_s):
        said(plan.label)
part_of(Hanging(gib(6)), {where!r}, "left")
"""


def said(*facts: Any) -> None:
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()


class Other:
    """Another process, with this module's names; killed in the end."""

    def __init__(self, script: str, where: str | Path) -> None:
        begin = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        code = begin + "from test_ledger import *\n" + script.format(where=str(where))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process: Any = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)  # type: ignore[call-overload]

    def hear(self) -> list[Any]:
        return list(json.loads(self._process.stdout.readline()))

    def go_on(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def check_taken_over(where: str | Path) -> None:
    with Other(KILLED, where) as other:
        assert other.hear() == ["at it"]
        mine = opened(where, "killed")
        assert mine.others_at_work
        other.kill()
        mine.catch_up()
        assert not mine.others_at_work
        with mine.claimed(PLANS[0]) as trial:
            assert trial is not None


def test_the_trial_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path: Path) -> None:
    check_taken_over(tmp_path / "study")


def test_on_another_host_a_beat_says_who_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "BEAT_S", 0.05)
    monkeypatch.setattr(ledger, "STALE_S", 0.5)
    mine, path = opened(tmp_path / "study"), tmp_path / "study"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(ledger, "_host", lambda: "another")
        theirs = opened(path)
        claim = theirs.claimed(PLANS[0])
        assert claim.__enter__() is not None
    stops = time.monotonic() + 0.8
    while time.monotonic() < stops:
        mine.catch_up()
        assert mine.others_at_work
        time.sleep(0.05)
    claim.__exit__(None, None, None)  # its end is written, as if it had lost its beat alone:
    number = theirs._study.trials[-1].number
    lost = mine._study.trials[number]
    lost.state = TrialState.RUNNING
    monkeypatch.setattr(mine, "_known", set())
    monkeypatch.setattr(mine._study, "get_trials", lambda deepcopy: [lost])
    mine.catch_up()
    assert mine.others_at_work
    time.sleep(0.6)
    mine.catch_up()
    assert not mine.others_at_work


@pytest.mark.skipif(find_spec("pymysql") is not None, reason="there is a driver for MySQL")
def test_a_missing_driver_is_named() -> None:
    with pytest.raises(
        BadInput, match=r"no driver for mysql here: pip install 'autofit\[mysql\]'$"
    ):
        studies.storage("mysql://localhost/x", "s")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:s3cret@127.0.0.1:1/x",
        "postgresql://ada:s3@cret@127.0.0.1:1/x",
        "postgresql://ada:s3/cret?x@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=ada&password=s3cret",
        "postgresql://ada:s3cret@127.0.0.1:port/x",
        "postgresql:ada:s3cret@127.0.0.1",
        "mysql://ada:s3cret@127.0.0.1:1/x",
        "nothing://ada:s3cret@127.0.0.1/x",
    ],
)
def test_a_password_is_never_shown(url: str) -> None:
    with pytest.raises(BadInput) as raised:
        studies.opened(url)
    assert not re.search("s3|cret|ada", str(raised.value))
    assert "cret" not in repr(Effort(storage=url))


@pytest.mark.parametrize("written", ["{}.journal", "{}.log", "journal://{}"])
def test_a_journal_is_shared_by_its_path(tmp_path: Path, written: str) -> None:
    where = written.format(tmp_path / "shared")
    found = short(World(gib(6)), studies.storage(where, "s"))
    assert short(World(gib(6)), studies.storage(where, "s"), trials=0) == found
    studies.storage(where, "other", fresh=True)
    assert short(World(gib(6)), studies.storage(where, "s"), trials=0) == found
    assert short(World(gib(6)), studies.storage(where, "s", fresh=True), trials=0).attempts == ()


def test_the_lock_of_a_process_that_was_killed_while_it_wrote_is_broken_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's own patience is half a minute."""
    monkeypatch.setattr(studies, "GRACE_S", 3)  # below it Optuna warns
    (tmp_path / "x.journal.lock").symlink_to(tmp_path / "x.journal")
    began_s = time.monotonic()
    found = short(World(gib(6)), studies.storage(str(tmp_path / "x.journal"), "s"))
    assert 3 <= time.monotonic() - began_s < 8
    assert len(found.attempts) == 4


def short(world: World, storage: Any = None, trials: int = 4) -> Found:
    """A study of a few trials."""
    limits, name = Limits(trials=trials), None if storage is None else "s"
    return search(FEW, world.measure, storage=storage, name=name, limits=limits)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("no/such/folder/x.journal", "No such file or directory; write as sqlite:///"),
        ("journal://", "Is a directory; write as sqlite:///"),
        ("notes.log", "is damaged (it begins with b'Dear diary,'): give another file"),
    ],
)
def test_what_is_no_journal_is_refused_and_left(
    where: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.log").write_text("Dear diary, not a line of this may go")
    with pytest.raises(BadInput, match=re.escape(said)):
        studies.opened(where)
    assert Path("notes.log").read_text() == "Dear diary, not a line of this may go"


# ---------------------------------------------------------------- a storage that fails


class Failing(studies._Journal):
    """A journal on a disk that is full from its ``left``-th write on, in the midst of a line."""

    left = 0

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.left -= 1
        with pytest.MonkeyPatch.context() as patch:
            if self.left < 0:
                patch.setattr(os, "fsync", self._full)
            super().append_logs(logs)

    def _full(self, _: int) -> None:
        os.truncate(self._path, self._path.stat().st_size - 5)
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writes", range(0, 60, 4))
def test_a_disk_that_is_full_ends_no_search_and_what_was_kept_stays_whole(
    writes: int, tmp_path: Path
) -> None:
    journal = Failing(tmp_path / "study")
    journal.left = writes
    world = World(gib(6))
    said = (
        r"^the study is no longer kept \(\[Errno 28\] No space left on device\): the search goes on"
        " in memory, and what it had kept before stays$"
    )
    with pytest.warns(UserWarning, match=said) as warned:
        found = short(world, optuna.storages.JournalStorage(journal))
    assert len(warned) == 1
    assert found == short(World(gib(6)))
    assert len(world.calls) == 4
    kept = short(World(gib(6)), stored(tmp_path / "study"), trials=0).attempts
    assert kept == found.attempts[: len(kept)]
    assert len(kept) >= (tmp_path / "study").read_text().count('"op_code":6')


@pytest.mark.parametrize("fault", ["gone", "dropped", "deleted"])
def test_a_database_that_is_lost_ends_no_search(fault: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    storage, world = studies.storage(url, "s"), World(gib(6))

    def measure(plan: Plan, give_up_s: float | None) -> Outcome:
        if len(world.calls) == 2:
            lose(fault, url, tmp_path / "studies.db")
        return world.measure(plan, give_up_s)

    with pytest.warns(UserWarning, match="^the study is no longer kept") as warned:
        found = search(FEW, measure, storage=storage, name="s", limits=Limits(trials=4))
    assert len(warned) == 1
    assert found == short(World(gib(6)))


def lose(fault: str, url: str, path: Path) -> None:
    if fault == "gone":
        path.write_bytes(b"overwritten" * 1000)
    elif fault == "dropped":
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE trials")
        database.close()
    else:
        studies.storage(url, "s", fresh=True)


# ---------------------------------------------------------------- a real PostgreSQL


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A server of our own on a socket, without a port. It refuses to run as root."""
    if (programs := next(filter(_server, SERVERS), "")) == "":
        pytest.skip("no PostgreSQL on this machine: Debian's package postgresql has it")
    folder = Path("/tmp") / f"autofit-pg-{os.getpid()}"  # sockets want short names
    user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    folder.mkdir()
    if user:
        shutil.chown(folder, **user)

    def run(program: str, *arguments: str) -> None:
        path = shutil.which(program, path=programs)
        done = subprocess.run(
            [str(path), *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, check=False,
            **user,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    data, log = str(folder / "data"), str(folder / "log")
    try:
        run("initdb", "-D", data, "-U", "autofit", "-A", "trust", "--no-sync")
        options = f"-c listen_addresses='' -k {folder} -F"
        run("pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield f"postgresql://autofit@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _server(programs: str | None) -> bool:
    """Whether its programs are in this folder, or on the PATH."""
    return all(shutil.which(program, path=programs) for program in ("initdb", "pg_ctl"))


def test_two_processes_share_a_study_in_a_database(postgres: str) -> None:
    with Other(SHARING, postgres) as one, Other(SHARING, postgres) as two:
        both = one, two
        assert [other.hear() for other in both] == [["ready"]] * 2
        for other in both:
            other.go_on()
        calls, known, bests = zip(*(other.hear() for other in both), strict=True)
    check(list(calls), list(map(set, known)), list(bests))


def test_in_a_database_a_killed_process_s_trial_is_taken_over_at_once(postgres: str) -> None:
    check_taken_over(postgres)


def test_in_a_database_a_search_does_what_a_killed_one_was_at(postgres: str) -> None:
    with Other(LEAVING, postgres) as other:
        (left,) = other.hear()
        other.kill()
    world = World(gib(6))
    found = part_of(world, postgres, "left")
    assert world.calls[0].label == left
    assert best_s(found) == best_s(search(TASK, World(gib(6)).measure))


def test_what_a_killed_process_had_kept_is_known(tmp_path: Path) -> None:
    """Though it had not ended the trial: it is measured once, and nobody waits for its end."""
    where = tmp_path / "study"
    with Other(ENDING, where) as other:
        assert other.hear() == ["kept"]
        mine = opened(where, "killed")
        assert mine.others_at_work
        assert mine.catch_up() == []
        other.kill()
        ((number, known),) = mine.catch_up()
        assert (number, known.plan) == (0, PLANS[0])
        assert not mine.others_at_work
    world = World(gib(6))
    found = search(
        TASK, world.measure, storage=stored(where), name="killed", limits=Limits(trials=2),
        first=PLANS[:2],
    )  # fmt: skip
    assert world.calls[0] == PLANS[1]
    assert known in found.attempts


def test_of_a_study_in_a_database_everything_is_forgotten_when_asked(postgres: str) -> None:
    found = search(TASK, World(gib(6)).measure, storage=stored(postgres), name="s")
    assert labels(found) == labels(part_of(World(gib(6)), postgres, "s"))
    anew = World(gib(6))
    storage = studies.storage(postgres, "s", fresh=True)
    assert search(TASK, anew.measure, storage=storage, name="s") == found
    assert len(anew.calls) == len(found.attempts)
