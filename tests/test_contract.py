"""What every technique owes. A new one is tested on the day that it becomes a candidate."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from conftest import Pipes
from numpy.typing import NDArray
from snapshots import differences, snapshot
from torch import nn

from autofit import anatomy
from autofit.probe import facts, probe_device
from autofit.spec import Device, Fidelity, Kernel, Phase, Pipeline, Slot, Technique, Workload
from autofit.techniques import CANDIDATES, KINDS
from autofit.techniques.decode import TiledVae
from autofit.techniques.feed_forward import ChunkedFeedForward
from autofit.techniques.placement import Resident
from autofit.trial import generate

STEPS, IMAGES, SIDE_PX, WIDE_PX = 2, 3, 64, 96
WORKLOAD = Workload(SIDE_PX, SIDE_PX, STEPS, batch=IMAGES, passes=2)
SAME_DTYPE_DB = 45.0
CLOSE_DB = 30.0  # in another dtype, and from run to run on a card
# FLUX rounds its timestep to the denoiser's dtype, and random weights amplify that. Pictures that
# have nothing in common are at 8 dB.
CLOSE_BFLOAT16_DB = 17.0
EXACT_CUDA_DB = 60.0  # memory at another address may get another convolution kernel
# Images as small as these are one tile of any candidate, and one chunk: what is run has tiles and
# chunks that cut them.
CUT = (TiledVae, ChunkedFeedForward)
SMALL = (TiledVae(SIDE_PX, 0.25), TiledVae(SIDE_PX, 0.25, sliced=True), ChunkedFeedForward(24))
RUN = (*(t for t in CANDIDATES if not isinstance(t, CUT)), *SMALL)


def each(techniques: Iterable[Technique]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "technique", techniques, ids=lambda t: t.label, indirect=True, scope="session"
    )


class Boom(Exception):
    pass


@dataclass
class Run:
    """One application of a technique, recorded: three generations, and one of another size."""

    images: list[NDArray[np.float32]]
    wide: NDArray[np.float32]
    left: list[str]


@pytest.fixture(scope="session")
def technique(request: pytest.FixtureRequest) -> Technique:
    found: Technique = request.param
    return found


@pytest.fixture(scope="session", autouse=True)
def _without_code_generation() -> Any:
    """On the CPU, compile to Python: tested are the change and its undo, not the compiler."""
    if torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        yield


@pytest.fixture(scope="session")
def probed(device: str) -> Device:
    if device != "cpu":
        return probe_device(device)
    kernels = tuple(
        Kernel(name, "float32", size) for name in ("flash", "math") for size in range(4, 136, 4)
    )
    return samples.device(kind="cpu", name="a CPU", capability=None, kernels=kernels)


@pytest.fixture(scope="session")
def pipeline(model: str, pipes: Pipes) -> Pipeline:
    return facts(pipes[model])


@pytest.fixture
def pipe(technique: Technique, model: str, pipes: Pipes, pipeline: Pipeline, probed: Device) -> Any:
    reason = technique.why_not(pipeline, probed, WORKLOAD)
    if reason is not None:
        pytest.skip(f"{technique.label}: {reason}")
    return pipes[model]


@pytest.fixture(scope="session")
def references() -> dict[tuple[str, str, int], NDArray[np.float32]]:
    return {}


@pytest.fixture(scope="session")
def reference(
    model: str, pipes: Pipes, device: str, references: dict[tuple[str, str, int], Any]
) -> Callable[[int], NDArray[np.float32]]:
    """The plain pipe's images, by width."""

    def images(width: int) -> NDArray[np.float32]:
        key = model, device, width
        if key not in references:
            with Resident().applied(pipes[model], device):
                references[key] = _generate(pipes[model], width)
        found: NDArray[np.float32] = references[key]
        return found

    return images


@pytest.fixture(scope="session")
def runs() -> dict[tuple[Technique, str, str], Run]:
    return {}


@pytest.fixture
def run(
    technique: Technique,
    model: str,
    device: str,
    pipe: Any,
    pipes: Pipes,
    runs: dict[tuple[Technique, str, str], Run],
) -> Run:
    key = technique, model, device
    if key not in runs:
        before = _snapshot(technique, pipe)
        with _on_device(technique, pipe, device):
            images = [_generate(pipe), _generate(pipe)]
            wide = _generate(pipe, WIDE_PX)
        with _on_device(technique, pipe, device):
            images.append(_generate(pipe))
        runs[key] = Run(images, wide, differences(before, _snapshot(technique, pipe)))
        if runs[key].left:
            pipes.discard(model)
    return runs[key]


class _on_device:
    """A technique with what it needs to run: all but placements need the weights on the device."""

    def __init__(self, technique: Technique, pipe: Any, device: str) -> None:
        self._contexts = [technique.applied(pipe, device)]
        if technique.slot is not Slot.PLACEMENT:
            self._contexts.append(Resident().applied(pipe, device))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _snapshot(technique: Technique, pipe: Any) -> dict[str, object]:
    # A placement may bring the weights back to other memory; which do not is tested by itself.
    return snapshot(pipe, memory=technique.slot is not Slot.PLACEMENT)


def _generate(pipe: Any, width: int = SIDE_PX) -> NDArray[np.float32]:
    images: NDArray[np.float32] = generate(pipe, replace(WORKLOAD, width=width), STEPS)
    return images


def _psnr_db(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    error = float(np.square(left.astype(np.float64) - right).mean())
    return -10 * math.log10(error) if error else math.inf


@each(RUN)
class TestWhatIsRun:
    def test_leaves_the_pipe_as_it_found_it(self, run: Run) -> None:
        assert run.left == []

    def test_undoes_after_an_error(
        self, technique: Technique, model: str, device: str, pipe: Any, pipes: Pipes
    ) -> None:
        before = _snapshot(technique, pipe)
        with pytest.raises(Boom), technique.applied(pipe, device):
            raise Boom
        left = differences(before, _snapshot(technique, pipe))
        if left:
            pipes.discard(model)
        assert left == []

    def test_undoes_after_an_error_in_the_denoiser(
        self, technique: Technique, model: str, device: str, pipe: Any, pipes: Pipes
    ) -> None:
        def fail(*_: Any) -> None:
            raise Boom

        denoiser = anatomy.denoiser(pipe)
        layer = next(m for m in denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d))
        before = _snapshot(technique, pipe)
        handle = layer.register_forward_hook(fail)
        with pytest.raises(Boom), _on_device(technique, pipe, device):
            _generate(pipe)
        handle.remove()
        left = differences(before, _snapshot(technique, pipe))
        if left:
            pipes.discard(model)
        assert left == []

    def test_output_is_as_faithful_as_it_says(
        self,
        technique: Technique,
        device: str,
        pipeline: Pipeline,
        reference: Callable[[int], NDArray[np.float32]],
        run: Run,
    ) -> None:
        dtype = technique.facts(pipeline).denoiser.dtype
        close = CLOSE_BFLOAT16_DB if dtype == "bfloat16" else CLOSE_DB
        if dtype == pipeline.denoiser.dtype:
            close = SAME_DTYPE_DB
        exact = math.inf if device == "cpu" else EXACT_CUDA_DB
        least = {Fidelity.EXACT: exact, Fidelity.NUMERIC: close, Fidelity.LOSSY: -math.inf}
        for images, width in ((run.images[0], SIDE_PX), (run.wide, WIDE_PX)):
            assert images.shape == (IMAGES, SIDE_PX, width, 3)
            assert np.isfinite(images).all()
            assert _psnr_db(images, reference(width)) >= least[technique.fidelity]

    def test_repeats_itself(self, device: str, run: Run) -> None:
        for images in run.images[1:]:
            if device == "cpu":
                assert np.array_equal(images, run.images[0])
            else:
                assert _psnr_db(images, run.images[0]) >= CLOSE_DB


@each(CANDIDATES)
class TestEveryCandidate:
    def test_survives_a_round_trip_of_its_settings(self, technique: Technique) -> None:
        again = KINDS[technique.name](**technique.settings)
        assert again == technique
        assert hash(again) == hash(technique)
        assert again.label == technique.label

    def test_says_why_not_in_a_sentence(
        self, technique: Technique, pipeline: Pipeline, probed: Device
    ) -> None:
        asked = pipeline, probed, WORKLOAD
        for reason in (technique.why_not(*asked), technique.why_pointless(*asked)):
            assert reason is None or (len(reason) > 10 and reason == reason.strip())
            assert reason is None or "\n" not in reason

    def test_hopes_for_positive_factors(self, technique: Technique, pipeline: Pipeline) -> None:
        effects = technique.effects(pipeline, WORKLOAD)
        assert set(effects) <= set(Phase)
        assert all(e.seconds > 0 and e.activations > 0 for e in effects.values())


def test_labels_are_unique() -> None:
    labels = [t.label for t in CANDIDATES]
    assert len(set(labels)) == len(labels)


def test_candidates_stand_in_the_order_of_the_slots() -> None:
    orders = [t.slot.order for t in CANDIDATES]
    assert orders == sorted(orders)
