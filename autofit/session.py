"""The verbs: plan, apply. The only file that knows all the others."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autofit import anatomy, architectures, host, host_budget, pinning, probe, report, store, trust
from autofit.applied import Applied, applied_on, parked
from autofit.child import Child
from autofit.goals import Goal, fidelity_named, workload_for
from autofit.match import Level, Match
from autofit.planner import Effort, Listener, Planned, find_plan
from autofit.spec import BadInput, Profile, Workload
from autofit.trial import InProcess, Job, Measurer, Worker
from autofit.trial import generate as run_pipe
from autofit.trust import Ask, Trusted

_EFFORT = Effort()
_log = logging.getLogger(__name__)


def plan(
    model: Any,
    *,
    budget: str | int,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    steps: int | None = None,
    device: str | None = None,
    fidelity: str = "lossy",
    host_ram: str | int | None = None,
    effort: Effort = _EFFORT,
) -> Profile:
    """Find, verify and store the fastest plan within the budget.

    ``model`` is a pipe (trials run on it, in this process, and leave it as found) or a name, folder
    or Hub id (trials run in a worker process). ``size`` is (width, height) in pixels. ``host_ram``
    bounds host memory, as "16GB"; so do the machine's and its cgroups' limits.

    Raises:
        BadInput: a value that cannot be.
        NothingFits: no plan stays within the budget; ``smallest_bytes`` is what would do. Or none
            stays within the host's memory.
    """
    goal = Goal(budget, size, batch, steps, fidelity=fidelity, host_ram=host_ram)
    target = device or default_device()
    effort.check()
    with host.granted(goal.host_ram_bytes), measuring(model, target) as measurer:
        defaults = model if isinstance(model, str) else None
        planned = find_plan(measurer, goal, effort, defaults=defaults)
        _try_to_keep(planned)
    return planned.profile


def keep(planned: Planned) -> Path:
    """Store what was planned, with the trials behind it. Returns the profile's path."""
    path = store.keep(planned.profile)
    pays = report.break_even(planned.profile, planned.attempts)
    why = report.why_json(planned.attempts, planned.ruled_out, planned.limit_s, pays)
    store.keep_why(path, why)
    return path


def apply(
    pipe: Any,
    *,
    budget: str | int | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    steps: int | None = None,
    profile: Profile | str | Path | None = None,
    device: str | None = None,
    fidelity: str = "lossy",
    host_ram: str | int | None = None,
    effort: Effort = _EFFORT,
    verify: bool = True,
    enforce: bool = True,
    cache_prompts: bool = True,
) -> Applied:
    """Make the pipe fit: apply a profile, or find the fastest plan within the budget and apply it.

    With ``budget``, a stored profile for the same pipe, workload and machine is used; one from
    other versions, another card or a larger workload once a trial has verified it. Without one, the
    pipe is planned for by trials in this process (seconds to minutes) and the profile stored.

    A ``profile`` is verified likewise where it was not measured on this machine and with these
    versions; ``verify=False`` applies it untried. Where its plan fails, its leaner ones follow.
    ``Applied.match`` says what the profile rests on.

    With ``enforce`` this process cannot hold more of the card than the budget (``Applied``). A call
    that runs out of memory begins again, with the same generators, by the profile's next leaner
    plan, and so do the calls after it.

    ``host_ram`` bounds host memory, as in ``plan``; a profile whose plan needs more does not hold.

    A prompt that comes again with the same arguments is not encoded again (``prompts.py``): its
    embeddings are in host memory, at most 256 MiB of them. ``cache_prompts=False`` turns that off.

    Raises:
        BadInput: neither budget nor profile, or a profile of another pipeline, or none of whose
            plans holds on this device.
        NothingFits: no plan stays within the budget, or within the host's memory, or others hold
            too much of the card.
    """
    if (budget is None) == (profile is None):
        raise BadInput('apply needs one of budget="8GB" and profile="file.yaml"')
    _check_untouched(pipe)
    target = device or default_device()
    if profile is not None and not isinstance(profile, Profile):
        profile = store.load(profile)
    asked = budget if profile is None else profile.budget_bytes
    assert asked is not None
    goal = Goal(asked, size, batch, steps, fidelity=fidelity, host_ram=host_ram)
    with host.granted(goal.host_ram_bytes):
        if profile is None:
            trusted = _stored_or_planned(pipe, target, goal, effort)
        else:
            ask = _ask(pipe, target, profile.workload, goal)
            trusted = trust.given(profile, ask if verify else replace(ask, measuring=None))
        _log.info("%s", trusted.match)
        return Applied(
            pipe,
            trusted,
            target,
            enforce=enforce,
            host_ram_bytes=goal.host_ram_bytes,
            cache_prompts=cache_prompts,
        )


def default_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def check_model(model: str) -> None:
    """Find out before a process is started for it.

    Raises:
        BadInput: there is no such model.
    """
    if model not in architectures.names():
        architectures.located(model)


@contextmanager
def measuring(
    model: Any, device: str, dtype: str | None = None, child: Child | None = None
) -> Iterator[Measurer]:
    """Who measures: a worker for a name (``child``, where its process runs already), this process
    for a pipe (on the CPU meanwhile, as are the pipes of this process that have a profile)."""
    if isinstance(model, str):
        check_model(model)
        worker = Worker(Job(model, dtype, device), child)
        try:
            yield worker
        finally:
            worker.close()
    else:
        _check_untouched(model)
        _check_needs_no_image(model)
        with ExitStack() as alone:
            for other in applied_on(probe.device_named(device)):
                alone.enter_context(other.suspended())
            alone.enter_context(parked(model))
            alone.enter_context(pinning.kept())
            yield InProcess(model, device)


def generate(pipe: Any, workload: Workload, prompt: str, seed: int) -> list[Any]:
    """Make a workload's images with a pipe as it is. Returns PIL images."""
    pixels = run_pipe(pipe, workload, workload.steps, prompt=prompt, seed=seed)
    return [Image.fromarray((p * 255).round().astype("uint8")) for p in np.asarray(pixels)]


def check_image(path: Path) -> None:
    """Refuse a file name that ``save_images`` could not write.

    Raises:
        BadInput: its ending names no image format.
    """
    if path.suffix.lower() not in Image.registered_extensions():
        raise BadInput(f"image {path}: {path.suffix!r} is no image format; write NAME.png")


def save_images(images: list[Any], path: Path) -> list[Path]:
    """Write one image to ``path``, several to ``name-0.png``, ``name-1.png``, ... beside it.

    Raises:
        BadInput: the file cannot be written, or its ending names no image format.
    """
    many = len(images) > 1
    paths = [path.with_stem(f"{path.stem}-{i}") if many else path for i in range(len(images))]
    for image, target in zip(images, paths, strict=True):
        try:
            image.save(target)
        except OSError as error:
            reason = error.strerror or error
            raise BadInput(f"image {target}: cannot be written ({reason}); give another") from error
        except ValueError as error:
            raise BadInput(
                f"image {target}: cannot be written ({error}); write NAME.png"
            ) from error
    return paths


def _stored_or_planned(pipe: Any, device: str, goal: Goal, effort: Effort) -> Trusted:
    workload = workload_for(probe.facts(pipe), goal)
    ask, at_worst = _ask(pipe, device, workload, goal), fidelity_named(goal.fidelity)
    trusted = trust.stored(ask, at_worst)
    if trusted is not None:
        return trusted
    with measuring(pipe, device) as measurer:
        begin = trust.smaller(ask, at_worst)
        planned = find_plan(measurer, goal, effort, listener=Listener(_log.info), begin=begin)
        _try_to_keep(planned)
    return Trusted(planned.profile, Match(Level.SAME, "planned here"))


def _try_to_keep(planned: Planned) -> None:
    """What took minutes to find is not lost to a disk that is full by now."""
    try:
        keep(planned)
    except BadInput as error:
        warnings.warn(f"found, but not stored: {error}", stacklevel=3)


class _Hosted(Ask):
    """An ask that nothing matches which the host's memory does not hold."""

    def match(self, profile: Profile) -> Match:
        found = super().match(profile)
        reason = None
        if found.level.is_usable:  # else its facts may be of another pipeline
            reason = host_budget.why_not(profile.plan, self.pipeline, self.device)
        return found if reason is None else Match(Level.NONE, f"its plan {reason}")


def _ask(pipe: Any, device: str, workload: Workload, goal: Goal) -> Ask:
    return _Hosted(
        probe.facts(pipe),
        goal.hosted(probe.probe_device(device)),
        workload,
        goal.budget_bytes,
        partial(measuring, pipe, device),
    )


def _check_needs_no_image(pipe: Any) -> None:
    """Refuse to measure image-to-image, inpainting and ControlNet pipes."""
    asked = inspect.signature(type(pipe).__call__).parameters
    given = "strength" in asked or "controlnet" in pipe.components
    if given and ("image" in asked or "control_image" in asked):
        raise BadInput(
            f"{type(pipe).__name__} needs an image, which trials do not have: apply to a text-to-"
            "image pipe and make this one of it (from_pipe), or apply a profile with verify=False"
        )


def _check_untouched(pipe: Any) -> None:
    """Refuse a pipe whose placement somebody else manages already."""
    name = type(pipe).__name__
    if not hasattr(pipe, "components"):
        raise BadInput(
            f"a {name} is no pipe: load one, as DiffusionPipeline.from_pretrained('org/name')"
        )
    if hasattr(pipe, "_autofit"):
        raise BadInput(f"{name} has a profile applied already: call revert() on it first")
    for part, module in anatomy.modules(pipe).items():
        if hasattr(module, "_autofit"):
            raise BadInput(
                f"{name}.{part} is part of a pipe with a profile applied: call revert() on that one"
            )
        if hasattr(module, "_orig_mod"):
            raise BadInput(
                f"{name}.{part} is compiled by torch.compile: give the pipe the module itself"
                f" (pipe.{part}._orig_mod); autofit compiles where it pays"
            )
        hooked = any(hasattr(m, "_hf_hook") for m in module.modules())
        if hooked or any(p.is_meta for p in module.parameters()):
            raise BadInput(
                f"{name}.{part} is offloaded already: call pipe.remove_all_hooks() and"
                " pipe.to('cpu'), or load the pipe anew, before autofit.apply"
            )
        registries: list[Any] = [getattr(m, "_diffusers_hook", None) for m in module.modules()]
        if any(r is not None and r.get_hook("group_offloading") for r in registries):
            raise BadInput(f"{name}.{part} is group-offloaded already: load the pipe anew")
