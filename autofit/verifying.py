"""What `autofit verify` does: run a profile's plan here, or predict it for a card of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autofit import architectures, gpus, probe, report, session, store, trust
from autofit.dryrun import DryRun
from autofit.dryrun.quiet import others_quiet
from autofit.forecast import TIME_SURE, Forecaster, image_s_band
from autofit.match import Match, environment, match, needed_bytes, unlike_description
from autofit.plain import plain
from autofit.probe import device_named
from autofit.spec import BadInput, Device, Failure, NothingFits, Outcome, Prediction, Profile
from autofit.trust import Ask, Trusted
from autofit.units import format_bytes, format_seconds


def verify(
    path: Path,
    model: str | None,
    device: str | None,
    dtype: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the plan in whole generations in a worker, and write what came of it into the file; into
    the user's folder too, unless ``output`` is where it goes.

    Raises:
        BadInput: the profile is for something else, or its plan cannot run here.
        NothingFits: the plan was run and did not hold; that is written too. Or others hold too
            much of the card.
    """
    profile, target = store.load(path), device or session.default_device()
    device_named(target)  # before the model is loaded
    model = model or _built_in(profile, path, dtype)
    with session.measuring(model, target, dtype) as measurer:
        subject = measurer.subject
        asked = subject.device, profile.workload, profile.budget_bytes
        found = match(replace(profile, evidence=()), subject.pipeline, *asked)
        if not found.level.is_usable:
            raise BadInput(f"profile {path}: {found.reason}: plan here with autofit plan")
        outcome = trust.tried(measurer, profile, profile.workload, profile.budget_bytes)
    on, target_path = environment(subject.device, profile.budget_bytes), output or path
    verified = trust.with_evidence(profile, outcome, on)
    store.save(verified, target_path)
    if output is None:  # an older outcome kept of this machine would count instead
        store.keep(verified)
    _show_verified(found, outcome, target_path, as_json)
    if isinstance(outcome, Failure):
        told = f"{outcome.why.value}: {outcome.detail}; plan here with autofit plan"
        raise NothingFits(f"profile {path}: its plan does not hold here: {told}", None)


def _show_verified(found: Match, outcome: Outcome, path: Path, as_json: bool) -> None:
    if as_json:
        key = "failure" if isinstance(outcome, Failure) else "measured"
        result = {"match": plain(found), key: plain(outcome), "path": str(path)}
        print(json.dumps(result, indent=2))
    else:
        print(f"{found}; {trust.outcome_text(outcome)}\nprofile   {path}")


def _built_in(profile: Profile, path: Path, dtype: str | None) -> str:
    """The built-in model that a profile is for.

    Raises:
        BadInput: none is.
    """
    for name in (a.name for a in architectures.ARCHITECTURES if a.cls == profile.pipeline):
        with others_quiet():
            found = probe.fingerprint(architectures.outline(name, dtype=dtype))
        if found == profile.fingerprint:
            return name
    raise BadInput(
        f"profile {path}: no built-in {profile.pipeline} has its configuration and dtypes: name the"
        f" model that it is for, as autofit verify {path.name} org/name"
    )


def predict(path: Path, model: str | None, gpu: str, dtype: str | None, as_json: bool) -> None:
    """Say what the plan, or the first of its leaner ones that should fit, needs and takes on a
    card that is not here. What it needs was measured; its time is predicted.

    Raises:
        BadInput: no such card, the profile is for something else, or no plan of it should fit.
    """
    profile, card = store.load(path), gpus.device_for(gpu)
    dry = DryRun(model or _built_in(profile, path, dtype), dtype=dtype)
    differing = unlike_description(profile, dry.pipeline)
    if differing is not None:
        raise BadInput(f"profile {path}: {differing}: plan for it with autofit plan")
    # A dry run's weights have another dtype until they are cast, and so another fingerprint.
    pipeline = replace(dry.pipeline, fingerprint=profile.fingerprint)
    trusted = trust.given(profile, Ask(pipeline, card, profile.workload, profile.budget_bytes))
    forecaster = Forecaster(dry, pipeline, card, profile.workload)
    predicted = forecaster.predict(trusted.profile.plan)
    if as_json:
        print(json.dumps(_prediction(trusted, predicted, card), indent=2))
    else:
        print(_lines(trusted, predicted, card))


def _prediction(trusted: Trusted, predicted: Prediction, card: Device) -> Mapping[str, Any]:
    return {
        "match": plain(trusted.match),
        "plan": plain(trusted.profile.plan),
        "needed_bytes": needed_bytes(trusted.profile.measured, card),
        "predicted": plain(predicted),
        "image_s_band": image_s_band(predicted, card),
        "on": {"device": card.name, "total_bytes": card.total_bytes},
    }


def _lines(trusted: Trusted, predicted: Prediction, card: Device) -> str:
    profile = trusted.profile
    least, most = map(format_seconds, image_s_band(predicted, card))
    techniques = report.plan_text(profile.plan).split(" + ")
    needed, whole = map(format_bytes, (needed_bytes(profile.measured, card), card.total_bytes))
    rows = [
        ("pipeline", f"{profile.pipeline}, {report.workload_text(profile.workload)}"),
        ("plan", *techniques),
        ("match", str(trusted.match)),
        ("peak", f"about {needed} of {whole}, by what was measured"),
        ("time", f"about {format_seconds(predicted.image_s)} a generation, {least} to {most}"),
        ("predicted", f"by dry run, not measured: {TIME_SURE}"),
        ("on", f"{card.name}, {whole}"),
    ]  # fmt: skip
    return report.fact_lines(rows)
