"""From a stored profile to one that holds here: matched, and verified by one trial where needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from autofit import cost, host_budget, places, report, store
from autofit.budgeted import references, same_but_weights
from autofit.match import (
    Level,
    Match,
    environment,
    larger,
    match,
    needed_bytes,
    other_budget,
)
from autofit.places import Entry, Item, Place, Question
from autofit.sampler import Task
from autofit.spec import (
    BadInput,
    Device,
    Environment,
    Evidence,
    Failure,
    Fidelity,
    Measurement,
    Outcome,
    Pipeline,
    Plan,
    Profile,
    Why,
    Workload,
)
from autofit.techniques.space import legal_plans
from autofit.trial import Measurer, Request, Subject
from autofit.units import format_bytes, format_seconds

REFERENCES = 2  # plans that are run for something to compare with, till one has made it
MACHINES = 100  # of which a profile keeps what came of its plan: each is 1 to 3 KB of its 1 MiB


@dataclass(frozen=True)
class Ask:
    """What a profile is wanted for, and who runs a trial of it; None: nothing is tried."""

    pipeline: Pipeline
    device: Device
    workload: Workload
    budget_bytes: int
    measuring: Callable[[], AbstractContextManager[Measurer]] | None = None

    def match(self, profile: Profile) -> Match:
        return match(profile, self.pipeline, self.device, self.workload, self.budget_bytes)


@dataclass(frozen=True)
class Trusted:
    """A profile to apply, and why."""

    profile: Profile
    match: Match


def given(profile: Profile, ask: Ask) -> Trusted:
    """The profile, or the first of its leaner plans that holds here. What comes of a trial is kept
    in the user's folder, and so is not run again.

    Raises:
        BadInput: it does not match, or neither its plan nor a leaner one holds here.
        NothingFits: other processes hold so much of the card that it cannot be verified.
    """
    reasons: list[str] = []
    for candidate in (profile, *_leaner(profile)):
        trusted = _settled(store.with_kept(candidate), ask)
        if not trusted.match.level.is_usable:
            reasons.append(trusted.match.reason)
            continue
        if reasons:
            told = f"{trusted.match.reason}; a leaner plan of the profile, whose own did not hold"
            return replace(trusted, match=Match(trusted.match.level, f"{told} ({reasons[0]})"))
        return trusted
    raise BadInput(f"the profile does not hold here: {reasons[0]}: plan here with autofit plan")


def stored(ask: Ask, at_worst: Fidelity) -> Trusted | None:
    """The stored profile that is trusted most and, of these, is fastest. If it has to be verified
    and does not hold, None: then a search is worth more than the next one's trial."""
    matched = [Trusted(p, ask.match(p)) for p in _candidates(ask, at_worst)]
    found = [t for t in matched if t.match.level.is_usable]
    if not found:
        return None
    best = min(found, key=lambda t: (t.match.level.rank, t.profile.measured.image_s))
    trusted = _settled(best.profile, ask)
    return trusted if trusted.match.level.is_usable else None


def smaller(ask: Ask, at_worst: Fidelity) -> Profile | None:
    """The stored profile to plan from where what is asked for is larger than was measured: of those
    within the budget that for the largest workload, and of these that for the largest budget."""
    found = [
        item
        for item in _alike(ask, at_worst)
        if larger(item.entry.workload, ask.workload) and item.entry.budget_bytes <= ask.budget_bytes
    ]
    found.sort(key=lambda i: (_count(i.entry.workload), i.entry.budget_bytes), reverse=True)
    return next(_profiles(found), None)


def _count(workload: Workload) -> int:
    return workload.pixels * workload.batch * workload.frames


def tried(measurer: Measurer, profile: Profile, workload: Workload, budget_bytes: int) -> Outcome:
    """Run a profile's plan in whole generations under the cap, without which nothing is trusted.
    What it makes is compared with what the most faithful other plan does, which is run short.

    Raises:
        NothingFits: other processes hold so much of the card that the plan cannot run.
    """
    subject, device, plan = measurer.subject, measurer.subject.device, profile.plan
    cap_bytes = min(budget_bytes, device.total_bytes)
    room_bytes = min(cap_bytes, device.total_bytes - subject.others_bytes)
    short = Request(
        plan,
        workload,
        cap_bytes,
        cost.outside_bytes(device),
        needed_bytes=needed_bytes(profile.measured, device),
    )
    with TemporaryDirectory() as folder:
        image = Path(folder) / "reference.npz"
        for other in islice(_others(plan, subject, workload, room_bytes), REFERENCES):
            measurer.measure(replace(short, plan=other, output=image))
            if image.exists():
                break
        whole = replace(short, full=True, reference=image)
        outcome = measurer.measure(whole)
        if isinstance(outcome, Failure) and outcome.why is Why.OVER_BUDGET:
            outcome = measurer.measure(whole)  # libraries were loaded in it, and count from now on
    return outcome


def with_evidence(profile: Profile, outcome: Outcome, on: Environment) -> Profile:
    """The profile with what came of its plan on a machine, in place of what had come of it there
    before; of ``MACHINES``, the latest. An error's words are left out: they may hold a path."""
    if isinstance(outcome, Failure):
        outcome = replace(outcome, detail="")
    others = (e for e in profile.evidence if e.on.machine != on.machine)
    return replace(profile, evidence=(*others, Evidence(outcome, on))[-MACHINES:])


def outcome_text(outcome: Outcome) -> str:
    """What came of a verifying trial, in a few words."""
    if isinstance(outcome, Measurement):
        seconds, peak = format_seconds(outcome.image_s), format_bytes(outcome.peak_bytes)
        told = f"verified here: {seconds} a generation, peak {peak}, {_compared(outcome)}"
        return "; ".join([told, *report.seams_text(outcome), *outcome.fallbacks])
    phase = f" in {outcome.phase.value}" if outcome.phase else ""
    return f"verified here, it failed: {outcome.why.value}{phase}"


def _compared(measured: Measurement) -> str:
    if measured.psnr_db is None:
        return "its image compared with none, for no other plan ran"
    if math.isinf(measured.psnr_db):
        return f"its image the same as that of {measured.reference}"
    return f"its image {measured.psnr_db:.1f} dB (PSNR) from that of {measured.reference}"


def _others(plan: Plan, subject: Subject, workload: Workload, budget_bytes: int) -> Iterator[Plan]:
    """Plans that should fit, to compare a plan with."""
    facts = subject.pipeline, subject.device, workload
    plans = tuple(p for p in legal_plans(*facts) if not same_but_weights(p, plan))
    for other in references(Task(plans, *facts, budget_bytes)):
        fitted = cost.fitted(other, *facts, budget_bytes)
        if fitted and host_budget.why_not(fitted, subject.pipeline, subject.device) is None:
            yield fitted


def _leaner(profile: Profile) -> Iterator[Profile]:
    for number, rung in enumerate(profile.ladder, 1):
        yield replace(
            profile,
            plan=rung.plan,
            measured=rung.measured,
            ladder=profile.ladder[number:],
            evidence=(),
        )


def _settled(profile: Profile, ask: Ask) -> Trusted:
    """Matched, and verified by a trial where the match or a short trial behind it asks for one."""
    found = ask.match(profile)
    short = found.level is Level.SAME and not _ran_whole(profile, ask)
    if ask.measuring is None or not (found.level.needs_trial or short):
        return Trusted(profile, found)
    with ask.measuring() as measurer:
        outcome = tried(measurer, profile, ask.workload, ask.budget_bytes)
    profile = _recorded(profile, outcome, ask)
    text = outcome_text(outcome)
    if isinstance(outcome, Failure):
        return Trusted(profile, Match(Level.NONE, text))
    return Trusted(profile, Match(found.level, f"{found.reason}; {text}"))


def _ran_whole(profile: Profile, ask: Ask) -> bool:
    """Whether the plan ran in whole generations on this machine: a leaner plan may have been
    measured by a short trial only."""
    machine = environment(ask.device, ask.budget_bytes).machine
    seen = [(profile.measured, profile.on), *((e.outcome, e.on) for e in profile.evidence)]
    return any(
        isinstance(outcome, Measurement) and outcome.verified and on.machine == machine
        for outcome, on in seen
    )


def _recorded(profile: Profile, outcome: Outcome, ask: Ask) -> Profile:
    """Keep what came of a trial: as evidence, or, for another workload or within a smaller budget,
    as a profile of its own."""
    here = environment(ask.device, ask.budget_bytes)
    if (ask.workload, ask.budget_bytes) == (profile.workload, profile.budget_bytes):
        profile = with_evidence(profile, outcome, here)
    elif isinstance(outcome, Failure):
        return profile  # it says nothing about what the profile is for
    else:
        profile = replace(
            profile, workload=ask.workload, budget_bytes=ask.budget_bytes, measured=outcome,
            on=here, ladder=(), evidence=(),
        )  # fmt: skip
    store.keep(profile)
    return profile


def _candidates(ask: Ask, at_worst: Fidelity) -> Iterator[Profile]:
    """Profiles of this pipeline as faithful as ``at_worst``, that of exactly this first; of one
    that is in many places the first, which knows what came of it here."""
    question = Question(
        ask.pipeline.fingerprint, ask.workload, ask.budget_bytes, ask.device, at_worst
    )
    exact = places.find(question)
    if exact is not None and ask.match(exact).level is Level.SAME:
        yield exact
        return
    yield from _profiles(item for item in _alike(ask, at_worst) if _may_match(item.entry, ask))


def _alike(ask: Ask, at_worst: Fidelity) -> list[Item]:
    """All that is known of this pipeline and as faithful as ``at_worst``; no file is read."""
    known, _ = places.items(places.places())  # faults were told of by find
    return [
        item
        for item in known
        if item.entry.fingerprint == ask.pipeline.fingerprint
        and item.entry.fidelity.rank <= at_worst.rank
    ]


def _may_match(entry: Entry, ask: Ask) -> bool:
    """Whether the index leaves it open: a file takes some 20 ms to read, and there may be many."""
    return not (
        larger(entry.workload, ask.workload)
        or other_budget(entry.peak_bytes, entry.budget_bytes, ask.budget_bytes)
    )


def _profiles(items: Iterable[Item]) -> Iterator[Profile]:
    for item in items:
        profile = _read(item.place, item.name)
        if profile is not None:
            yield store.with_kept(profile)


def _read(place: Place, name: str) -> Profile | None:
    try:
        return place.load(name)
    except BadInput:  # gone since it was listed
        return None
