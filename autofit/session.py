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

from autofit import anatomy, probe, store, techniques
from autofit.planner import Effort, Goal, fidelity_named, find_plan, workload_for
from autofit.spec import BadInput, Profile, Workload
from autofit.trial import InProcess, Job, Measurer, Worker, release
from autofit.trial import generate as run_pipe


def plan(
    model: Any,
    *,
    budget: str | int,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    steps: int | None = None,
    device: str | None = None,
    fidelity: str = "lossy",
    effort: Effort = Effort(),
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
        return find_plan(measurer, goal, effort, defaults=defaults).profile


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
    effort: Effort = Effort(),
) -> Applied:
    """Make the pipe fit: apply a profile, or find the fastest plan within the budget and apply it.

    With ``budget``, a stored profile for the same pipe, workload and machine is used; without one,
    the pipe is planned for by trials in this process (seconds to minutes) and the profile stored.

    Raises:
        BadInput: neither budget nor profile, or a profile of another pipeline.
        NothingFits: no plan stays within the budget.
    """
    if (budget is None) == (profile is None):
        raise BadInput('apply needs one of budget="8GB" and profile="file.yaml"')
    _check_untouched(pipe)
    target = device or default_device()
    if profile is None:
        assert budget is not None
        goal = Goal(budget, size, batch, steps, fidelity=fidelity)
        profile = _stored(pipe, goal, target) or _planned_here(pipe, goal, effort, target)
    elif not isinstance(profile, Profile):
        profile = store.load(profile)
    _check_same(pipe, profile)
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


def _stored(pipe: Any, goal: Goal, device: str) -> Profile | None:
    pipeline = probe.facts(pipe)
    workload = workload_for(pipeline, goal)
    return store.find(
        pipeline.fingerprint,
        workload,
        goal.budget_bytes,
        probe.probe_device(device),
        fidelity_named(goal.fidelity),
    )


def _planned_here(pipe: Any, goal: Goal, effort: Effort, device: str) -> Profile:
    with measuring(pipe, device) as measurer:
        profile = find_plan(measurer, goal, effort).profile
    store.keep(profile)
    return profile


@contextmanager
def _parked(pipe: Any) -> Iterator[None]:
    """The pipe's weights on the CPU inside, each back on its device on exit."""
    found = {
        name: next(module.parameters()).device for name, module in anatomy.modules(pipe).items()
    }
    parts = anatomy.modules(pipe)
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
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise BadInput(f"{name}.{part} is group-offloaded already: load the pipe anew")


def _check_same(pipe: Any, profile: Profile) -> None:
    if profile.pipeline != type(pipe).__name__:
        raise BadInput(
            f"the profile is for {profile.pipeline}, this pipe is a {type(pipe).__name__}: plan for"
            " it with autofit plan"
        )
    if profile.fingerprint != probe.fingerprint(pipe):
        raise BadInput(
            f"the profile is for another {profile.pipeline} (configuration, dtypes or adapters"
            " differ): plan for this one with autofit plan"
        )
