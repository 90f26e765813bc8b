"""The verbs: plan, apply. The only file that knows all the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image

from autofit import anatomy, probe, report, store, techniques
from autofit.planner import Effort, Goal, Planned, fidelity_named, find_plan, workload_for
from autofit.spec import BadInput, Pipeline, Profile, Workload
from autofit.trial import InProcess, Job, Measurer, Worker, release
from autofit.trial import generate as run_pipe

_EFFORT = Effort()


def plan(
    model: Any,
    *,
    budget: str | int,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    steps: int | None = None,
    device: str | None = None,
    fidelity: str = "lossy",
    effort: Effort = _EFFORT,
) -> Profile:
    """Find, verify and store the fastest plan within the budget.

    ``model`` is a pipe (trials run on it, in this process, and leave it as found) or a name, folder
    or Hub id (trials run in a worker process). ``size`` is (width, height) in pixels.

    Raises:
        BadInput: a value that cannot be.
        NothingFits: no plan stays within the budget; ``smallest_bytes`` is what would do.
    """
    goal = Goal(budget, size, batch, steps, fidelity=fidelity)
    with measuring(model, device or default_device()) as measurer:
        defaults = model if isinstance(model, str) else None
        planned = find_plan(measurer, goal, effort, defaults=defaults)
    keep(planned)
    return planned.profile


def keep(planned: Planned) -> Path:
    """Store what was planned, with the trials behind it. Returns the profile's path."""
    path = store.keep(planned.profile)
    store.keep_why(path, report.why_json(planned.attempts, planned.ruled_out))
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
    effort: Effort = _EFFORT,
) -> Applied:
    """Make the pipe fit: apply a profile, or find the fastest plan within the budget and apply it.

    With ``budget``, a stored profile for the same pipe, workload and machine is used; without one,
    the pipe is planned for by trials in this process (seconds to minutes) and the profile stored.

    Raises:
        BadInput: neither budget nor profile, or a profile of another pipeline, or whose plan this
            device cannot run.
        NothingFits: no plan stays within the budget.
    """
    if (budget is None) == (profile is None):
        raise BadInput('apply needs one of budget="8GB" and profile="file.yaml"')
    _check_untouched(pipe)
    target, pipeline = device or default_device(), probe.facts(pipe)
    if profile is None:
        assert budget is not None
        goal = Goal(budget, size, batch, steps, fidelity=fidelity)
        profile = _stored(pipeline, goal, target)
        if profile is None:
            with measuring(pipe, target) as measurer:
                planned = find_plan(measurer, goal, effort)
            keep(planned)
            profile = planned.profile
    elif not isinstance(profile, Profile):
        profile = store.load(profile)
    _check_same(pipeline, profile)
    _check_possible(pipeline, profile, target)
    return Applied(pipe, profile, target)


class Applied:
    """A pipe with a profile applied: ``profile``, ``revert()``, and a context manager."""

    def __init__(self, pipe: Any, profile: Profile, device: str) -> None:
        self.profile = profile
        self._device = torch.device(device)
        with ExitStack() as stack:
            stack.enter_context(_parked(pipe))
            stack.enter_context(techniques.applied(profile.plan, pipe, device))
            stack.enter_context(anatomy.attribute(pipe, "_autofit", self))
            self._undo = stack.pop_all()

    def revert(self) -> None:
        """Leave the pipe as it was found. A second call does nothing."""
        self._undo.close()
        release(self._device)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.revert()


def default_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


@contextmanager
def measuring(model: Any, device: str, dtype: str | None = None) -> Iterator[Measurer]:
    """Who measures: a worker for a name, this process for a pipe (parked on the CPU meanwhile)."""
    if isinstance(model, str):
        worker = Worker(Job(model, dtype, device))
        try:
            yield worker
        finally:
            worker.close()
    else:
        _check_untouched(model)
        with _parked(model):
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
        except (OSError, ValueError) as error:
            raise BadInput(
                f"image {target}: cannot be written ({error}); write NAME.png"
            ) from error
    return paths


def _stored(pipeline: Pipeline, goal: Goal, device: str) -> Profile | None:
    workload = workload_for(pipeline, goal)
    return store.find(
        pipeline.fingerprint,
        workload,
        goal.budget_bytes,
        probe.probe_device(device),
        fidelity_named(goal.fidelity),
    )


@contextmanager
def _parked(pipe: Any) -> Iterator[None]:
    """The pipe's weights on the CPU inside, each back on its device on exit."""
    parts = anatomy.modules(pipe)
    found = {
        name: next((t.device for _, _, t in anatomy.tensors(module)), torch.device("cpu"))
        for name, module in parts.items()
    }
    try:
        for module in parts.values():
            module.to("cpu")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        yield
    finally:
        for name, device in found.items():
            parts[name].to(device)


def _check_untouched(pipe: Any) -> None:
    """Refuse a pipe whose placement somebody else manages already."""
    name = type(pipe).__name__
    if hasattr(pipe, "_autofit"):
        raise BadInput(f"{name} has a profile applied already: call revert() on it first")
    for part, module in anatomy.modules(pipe).items():
        hooked = any(hasattr(m, "_hf_hook") for m in module.modules())
        if hooked or any(p.is_meta for p in module.parameters()):
            raise BadInput(
                f"{name}.{part} is offloaded already: call pipe.remove_all_hooks() and"
                " pipe.to('cpu'), or load the pipe anew, before autofit.apply"
            )
        registries: list[Any] = [getattr(m, "_diffusers_hook", None) for m in module.modules()]
        if any(r is not None and r.get_hook("group_offloading") for r in registries):
            raise BadInput(f"{name}.{part} is group-offloaded already: load the pipe anew")


def _check_same(pipeline: Pipeline, profile: Profile) -> None:
    if profile.pipeline != pipeline.cls:
        raise BadInput(
            f"the profile is for {profile.pipeline}, this pipe is a {pipeline.cls}: plan for"
            " it with autofit plan"
        )
    if profile.fingerprint != pipeline.fingerprint:
        raise BadInput(
            f"the profile is for another {profile.pipeline} (configuration, dtypes or adapters"
            " differ): plan for this one with autofit plan"
        )


def _check_possible(pipeline: Pipeline, profile: Profile, device: str) -> None:
    """A profile made on one machine may ask for what another has not."""
    facts = pipeline, probe.probe_device(device), profile.workload
    reason = techniques.why_not(profile.plan, *facts)
    if reason is not None:
        raise BadInput(f"the profile's plan cannot run on {device} ({reason}): plan for it here")
