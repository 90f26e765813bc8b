"""The pipeline's own call on fake tensors: the facts of encoding and of one step, and the latents
that come to be decoded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from autofit import anatomy
from autofit.dryrun.ghost import Ghost, hollow
from autofit.dryrun.memo import Front, Latents
from autofit.dryrun.record import Fused, Recorder, Section
from autofit.spec import BadInput, Role, Technique, Workload
from autofit.trial.generation import asked_of


class _AtDecode(Exception):
    """The latents are there: the rest of the pipeline's call is not needed."""


def run_front(ghost: Ghost, workload: Workload, techniques: Sequence[Technique]) -> Front:
    """Run encoding and one step. Memory is bounded: all tensors are fake.

    Raises:
        BadInput: the pipeline's call needs values, which fake tensors do not have.
    """
    with faked(ghost, techniques):
        recorder = Recorder()
        watch = _Watch(ghost.pipe, recorder)
        with watch.installed(), torch.no_grad(), ghost.mode, recorder, Fused(recorder):
            _call(ghost.pipe, workload)
    if watch.latents is None:
        raise BadInput(f"{type(ghost.pipe).__name__} decodes with no VAE: no dry run for it")
    encode, step = (s.facts(0) for s in watch.sections)
    return Front(encode, step, watch.latents)


@contextmanager
def faked(
    ghost: Ghost, techniques: Sequence[Technique], roles: Collection[Role] = tuple(Role)
) -> Iterator[None]:
    """The pipe's components of these roles with fake weights of its dtype, and the techniques that
    change its operations."""
    with ExitStack() as stack:
        stack.enter_context(hollow(ghost, roles))
        for technique in techniques:
            stack.enter_context(technique.applied(ghost.pipe, "cpu"))
        yield


def _call(pipe: Any, workload: Workload) -> None:
    asked = asked_of(pipe, workload, steps=1) | {"output_type": "pt"}
    if "clean_caption" in inspect.signature(type(pipe).__call__).parameters:
        asked["clean_caption"] = False
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(**asked)
    except _AtDecode:
        pass
    except Exception as error:  # other people's code, on tensors without values
        raise BadInput(
            f"{type(pipe).__name__} cannot be run dry ({type(error).__name__}:"
            f" {(str(error).strip() or 'no detail').splitlines()[0][:200]});"
            " measure it on the device instead"
        ) from error


class _Watch:
    """Stands between the pipeline and its denoiser, scheduler and VAE while it is called."""

    def __init__(self, pipe: Any, recorder: Recorder) -> None:
        self.pipe, self.recorder = pipe, recorder
        modules = anatomy.modules(pipe).values()
        self.weights = [t for module in modules for _, _, t in anatomy.tensors(module)]
        for tensor in self.weights:
            recorder.follow(tensor)
        self.weight_bytes = recorder.live_bytes
        self.sections = (Section(), Section())  # encode, step
        self.latents: Latents | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        scheduler, vae = self.pipe.scheduler, anatomy.vae(self.pipe)
        with ExitStack() as stack:
            found = {n: getattr(scheduler, n) for n in ("set_timesteps", "step")}
            stands_in = {
                "set_timesteps": _outside(found["set_timesteps"]),
                "step": _named_as(found["step"], self._step),
                "scale_model_input": lambda sample, *_: sample * 1.0,
            }
            for name, value in stands_in.items():
                stack.enter_context(anatomy.attribute(scheduler, name, value))
            if vae is not None:
                stack.enter_context(anatomy.attribute(vae, "decode", self._decode))
            hook = anatomy.denoiser(self.pipe).register_forward_pre_hook(self._on_denoiser)
            stack.callback(hook.remove)
            self._begin(0)
            yield

    def _begin(self, number: int) -> None:
        self.recorder.section = self.sections[number]
        self.recorder.mark()

    def _end(self) -> None:
        self.recorder.close(self.weight_bytes)
        self.recorder.section = Section()

    def _on_denoiser(self, *_: Any) -> None:
        if self.recorder.section is self.sections[0]:
            self._end()
            self._begin(1)

    def _step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
              *_: Any, **__: Any) -> tuple[torch.Tensor]:  # fmt: skip
        """A scheduler's step asks for values, and does little: sum and difference of latents."""
        if self.recorder.section is self.sections[1]:
            self._end()
        return (sample + model_output,)

    def _decode(self, latents: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Weights that the pipeline has cast on the way here count as weights, not as held."""
        weights = {id(tensor) for tensor in self.weights}
        cast = [t for _, _, t in anatomy.tensors(self.pipe.vae) if id(t) not in weights]
        others_bytes = self.weight_bytes + _storage_bytes(latents, *cast)
        held_bytes = self.recorder.live_bytes - others_bytes
        dtype = str(latents.dtype).removeprefix("torch.")
        self.latents = Latents(tuple(latents.shape), dtype, held_bytes)
        raise _AtDecode


def _storage_bytes(*tensors: torch.Tensor) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _named_as(found: Any, stand_in: Any) -> Any:
    """Pipelines read the signature of what they call."""

    @functools.wraps(found)
    def run(*args: Any, **kwargs: Any) -> Any:
        return stand_in(*args, **kwargs)

    return run


def _outside(method: Any) -> Any:
    """Run on true tensors: a schedule is made of values."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    return _named_as(method, run)
