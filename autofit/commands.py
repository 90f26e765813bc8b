"""What each command does once its words are understood: call session, show what came."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from autofit import architectures, gpus, host, outlook, report, session, store, tables, team
from autofit.child import Child
from autofit.foresight import Foresight
from autofit.goals import Goal
from autofit.planner import RESUMES, Effort, Interrupted, Listener, Planned, find_plan
from autofit.probe import device_named, probe_device
from autofit.search import Progress
from autofit.spec import BadInput, Device, Failure, Measurement
from autofit.units import format_bytes, format_seconds

LOG_WIDTH = 160  # of tables that go to a file
NO_CARD = (
    "no CUDA device here, so trials run on the CPU; to predict for a card instead, write"
    " --gpu rtx-4060"
)

Listeners = Callable[..., Listener]  # of a line of the progress, and a heading


def plan(
    model: str,
    goal: Goal,
    effort: Effort,
    device: str | None,
    dtype: str | None,
    output: Path | None,
    as_json: bool,
    workers: int = 1,
    child: Child | None = None,
) -> None:
    """``child`` is the process of the first worker, where it runs already."""
    console = stderr_console()
    target = device or session.default_device()
    # Found out before the model is loaded; not probed, which would take memory from the worker's.
    device_named(target)
    effort.check()
    others = team.devices(target, workers)[1:]
    start = time.monotonic()
    with _started(goal, workers):
        helpers = team.Team([team.Ask(model, goal, effort.joined, d, dtype) for d in others])
    try:
        with (
            _started(goal, workers),
            interruptible(console),
            watched(console) as listeners,
            closing(helpers),
        ):
            listener = listeners(0)
            if device is None and target == "cpu":
                listener.stage(NO_CARD)
            listener.stage(f"loading {model} in {'workers' if others else 'a worker'} on {target}")
            foresight = Foresight(model, goal, target, dtype)
            with session.measuring(model, target, dtype, child) as measurer:
                planned = find_plan(
                    measurer,
                    goal,
                    effort,
                    listener=listener,
                    defaults=model,
                    foresee=foresight.basis,
                    helped=helpers,
                )
    finally:
        for fault in helpers.faults:
            console.print(f"warning: {fault}", style="yellow")
    took_s = time.monotonic() - start
    try:
        if output is not None:
            store.save(planned.profile, output)
        path = session.keep(planned)
    except BadInput:  # a disk that is full by now: what took minutes is shown at least
        _show_planned(console, planned, None, took_s, as_json)
        raise
    _show_planned(console, planned, path, took_s, as_json)


@contextmanager
def _started(goal: Goal, workers: int) -> Iterator[None]:
    """What the processes that are started inside may have of the host."""
    with host.granted(goal.host_ram_bytes), host.shared(workers):
        yield


def _show_planned(
    console: Console, planned: Planned, path: Path | None, took_s: float, as_json: bool
) -> None:
    profile = planned.profile
    print_trials(console, planned, took_s)
    if as_json:
        print(json.dumps(found_json(planned, path, took_s), indent=2))
    else:
        pays = report.break_even_json(report.break_even(profile, planned.attempts))
        print(report.profile_lines(profile, planned.limit_s, pays))
        if path is not None:
            print(f"profile   {path}")


def print_trials(console: Console, planned: Planned, took_s: float) -> None:
    """All that was tried, and how long that took in seconds."""
    profile = planned.profile
    console.print(tables.trials_table(planned.attempts, profile.plan, profile.budget_bytes))
    console.print(f"{len(planned.attempts)} trials, planned in {format_seconds(took_s)}")


def found_json(planned: Planned, path: Path | None, took_s: float) -> dict[str, Any]:
    """What ``--json`` prints of a plan; ``path`` is where its profile is kept."""
    subject = planned.subject
    found = report.study_json(
        planned.profile, planned.attempts, subject.pipeline, subject.device, planned.limit_s
    )
    return found | {"path": None if path is None else str(path), "plan_s": took_s}


def whole_card(device: str | None) -> int:
    """The budget where none is given.

    Raises:
        BadInput: the device is a CPU.
    """
    target = device or session.default_device()
    if not target.startswith("cuda"):
        raise BadInput(f"budget: {target} has no card to fill; give one, as --budget 8GB")
    device_named(target)
    return outlook.whole_card_bytes(None, probe_device(target))


def probe(device: str | None, fresh: bool, as_json: bool) -> None:
    _show_device(probe_device(device or session.default_device(), fresh=fresh), as_json)


def look_up(gpu: str, as_json: bool) -> None:
    _show_device(gpus.device_for(gpu), as_json)


def _show_device(found: Device, as_json: bool) -> None:
    if as_json:
        print(report.device_json(found))
    else:
        Console(highlight=False).print(tables.device_table(found))


def run(
    model: str,
    profile_path: Path,
    prompt: str,
    output: Path,
    seed: int,
    host_ram: str | None,
    device: str | None,
    dtype: str | None,
) -> None:
    profile = store.load(profile_path)
    Goal(profile.budget_bytes, host_ram=host_ram)  # a size that is none is found out now
    session.check_image(output)
    device_named(device or session.default_device())  # before the model is loaded
    pipe = architectures.load(model, dtype=dtype)
    with session.apply(pipe, profile=profile, device=device, host_ram=host_ram) as fit:
        stderr_console().print(f"match     {fit.match}")
        start = time.perf_counter()
        images = session.generate(pipe, profile.workload, prompt, seed)
        took_s = time.perf_counter() - start
    paths = session.save_images(images, output)
    stderr_console().print(f"made in {format_seconds(took_s)}, the first call's set-up included")
    print("\n".join(map(str, paths)))


def show(path: Path, why: bool, as_json: bool) -> None:
    profile = store.load(path)
    known = store.load_why(path) or {}
    reasons = known if why else None
    if why and not known:
        raise BadInput(
            f"{path}: the trials behind it are not on this machine; plan here to see them"
        )
    if as_json:
        data = json.loads(report.profile_json(profile))
        print(json.dumps(data if reasons is None else {"profile": data, "why": reasons}, indent=2))
        return
    print(report.profile_lines(profile, known.get("limit_s"), known.get("break_even")))
    if reasons is not None:
        print("\n" + report.why_lines(reasons))


def stderr_console() -> Console:
    """Progress and tables go to stderr; rich colours them on a terminal only."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


@contextmanager
def interruptible(console: Console) -> Iterator[None]:
    """Ctrl-C within says how to go on from there, and shows what a search had tried."""
    try:
        yield
    except Interrupted as stopped:
        best = stopped.best.plan if stopped.best else None
        console.print(tables.trials_table(stopped.attempts, best, stopped.budget_bytes))
        raise
    except KeyboardInterrupt:  # while loading, between two trials, or verifying
        raise Interrupted(RESUMES) from None


@contextmanager
def watched(console: Console, count: int = 1) -> Iterator[Listeners]:
    """Live progress of so many searches at once on a terminal, a line a trial elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    live = console.is_terminal
    with Bar(*columns, console=console, transient=True, disable=not live) as bar:
        jobs = [bar.add_task("starting", total=None) for _ in range(count)]
        yield lambda number, head="": _listener(bar, jobs[number], head)


def _listener(bar: Bar, job: TaskID, head: str) -> Listener:
    """Tells what it hears on one line of the bar, each text after the heading."""

    def stage(text: str) -> None:
        bar.update(job, description=head + text, total=None)
        if bar.disable:
            bar.console.print(head + text)

    def progress(event: Progress) -> None:
        share = max(event.number / event.limits.trials, event.elapsed_s / event.limits.timeout_s)
        left_s = max(0.0, event.limits.timeout_s - event.elapsed_s)
        left = f"at most {format_seconds(left_s)} left"
        text = f"{head}trial {event.number + 1} · {_best(event)} · {left}"
        bar.update(job, description=text, total=1.0, completed=min(1.0, share))
        if event.outcome is not None:
            text = report.plan_text(event.plan)
            bar.console.print(f"{head}{event.number + 1:>3}  {_result(event)}  {text}")

    return Listener(stage, progress)


def _best(event: Progress) -> str:
    if event.best is None or isinstance(event.best.outcome, Failure):
        return "nothing fits yet"
    return f"best {format_seconds(event.best.outcome.image_s)} an image"


def _result(event: Progress) -> str:
    outcome: Any = event.outcome
    if isinstance(outcome, Measurement):
        return f"{format_seconds(outcome.image_s):>8}  {format_bytes(outcome.peak_bytes):>10}"
    return f"{outcome.why.value:>20}"
