"""Denoisers whose weights stream and whose forwards are CUDA graphs, transfers included."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Pipes
from snapshots import differences
from streaming_nets import noted
from test_streaming import (
    UNIT_BYTES,
    assert_alike,
    images,
    plain,
    run_bytes,
    settled_bytes,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from autofit import anatomy, prompts, techniques
from autofit.spec import Plan
from autofit.streaming import doors, engine
from autofit.streaming.lanes import HostLane, Tensors
from autofit.streaming.parts import Part
from autofit.streaming.pool import Pool
from autofit.streaming.replay import Moving
from autofit.streaming.script import Script
from autofit.streaming.units import Division, Unit, Weight
from autofit.techniques import cuda_graph, images_to_settle
from autofit.techniques.capture import Capturer, Weights
from autofit.techniques.cuda_graph import CudaGraph
from autofit.techniques.placement import Resident
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.streamed import Streamed

__all__ = ["plain"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_gradients")


class Tape(TorchDispatchMode):
    """Stands in for CUDA: what a capture runs is written down with the memory that it reads and
    writes, and a replay runs just that, in that memory."""

    made: list[Tape]

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._operations = device, list[tuple[Any, Any, Any, Any]]()
        self.replays = 0
        self.made.append(self)

    def is_capturing(self) -> bool:
        return False

    def capture(self, work: Callable[[], Any], weights: Weights) -> tuple[Callable[[], None], Any]:
        work()
        weights.begin()
        self._operations = operations = []
        eagerly = torch.compiler.set_stance("force_eager")  # no compiled code runs in a mode
        with eagerly, self, weights.capturing():
            result = work()

        def replay() -> None:
            self.replays += 1
            for function, args, kwargs, outputs in operations:
                made = function(*args, **kwargs)
                for old, new in zip(tree_leaves(outputs), tree_leaves(made), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay, result

    def run(self, work: Callable[[], Any]) -> Any:
        return work()

    def release(self) -> None:
        self._operations = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Not the tensors: a parameter's memory is what a graph has.
        given = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, out)
        self._operations.append((func, *given, kept))
        return out


@pytest.fixture
def replays(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many forwards were replayed, on a device or by a stand-in for its captures."""
    counts: list[int] = []
    if device == "cpu":
        monkeypatch.setattr(Tape, "made", [], raising=False)
        monkeypatch.setattr(cuda_graph, "Capturer", Tape)
        yield lambda: sum(tape.replays for tape in Tape.made)
        return
    capture = Capturer.capture

    def counted(self: Capturer, work: Any, weights: Weights) -> Any:
        replay, result = capture(self, work, weights)

        def run() -> None:
            counts.append(1)
            replay()

        return run, result

    monkeypatch.setattr(Capturer, "capture", counted)
    yield lambda: len(counts)


def weights_bytes(pipe: Any, share: float | None) -> int | None:
    return None if share is None else int(share * run_bytes(pipe)) + settled_bytes(pipe)


@contextmanager
def graphed(pipe: Any, share: float | None, device: str) -> Iterator[None]:
    streamed = Streamed(weights_bytes(pipe, share), UNIT_BYTES)
    with techniques.applied(Plan((CudaGraph(), streamed)), pipe, device):
        yield


@pytest.mark.parametrize("share", [None, 0.5, 0.9, 2.0])
def test_images_are_the_resident_pipes(
    share: float | None, model: str, pipes: Pipes, device: str, plain: Any, replays: Any
) -> None:
    pipe = pipes[model]
    wanted, before = plain(model, device), noted(pipe, device)
    with graphed(pipe, share, device):
        for _ in range(4):
            assert_alike(images(pipe), wanted, device)
        settled = replays()
        assert settled > 0
        assert_alike(images(pipe), wanted, device)
        assert replays() == settled + 2  # both steps
    assert differences(before, noted(pipe, device)) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-flux"])
def test_compiled_blocks_stream_layer_by_layer_in_graphs(
    name: str, pipes: Pipes, device: str, replays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, compiled = pipes[name], CudaGraph(compiled=True)
    if device == "cpu":
        eager = functools.partial(torch.compile, backend="eager")
        monkeypatch.setattr(torch, "compile", eager)
    with techniques.applied(Plan((compiled, Resident())), pipe, device):
        wanted = images(pipe)
    resident, before = replays(), noted(pipe, device)
    streamed = Streamed(weights_bytes(pipe, 0.5), UNIT_BYTES)
    with techniques.applied(Plan((compiled, streamed)), pipe, device):
        for _ in range(4):
            assert_alike(images(pipe), wanted, device)
        assert any(map(doors.layers, anatomy.denoiser(pipe).modules()))
    assert replays() > resident
    assert differences(before, noted(pipe, device)) == []


def test_sizes_that_change_have_graphs_of_their_own(
    pipes: Pipes, device: str, plain: Any, replays: Any
) -> None:
    """The fifth size and those after it run eagerly, between the replays of the others."""
    pipe = pipes["tiny-sd"]
    sizes = [(64, 64, 2), (96, 64, 2), (64, 96, 2), (128, 64, 2), (64, 128, 2)]
    wanted = [plain("tiny-sd", device, *size) for size in sizes]
    with graphed(pipe, 0.5, device):
        for number in range(25):
            which = number % 5 if number < 15 else (number * 3) % 5
            assert_alike(images(pipe, *sizes[which]), wanted[which], device)
    assert replays() > 20


def test_a_graph_is_captured_in_the_second_image(pipes: Pipes, device: str, replays: Any) -> None:
    """Which is when the trials begin to count."""
    pipe = pipes["tiny-sd"]
    plan = Plan((CudaGraph(), Streamed(weights_bytes(pipe, 0.5), UNIT_BYTES)))
    assert images_to_settle(plan) == 2
    assert images_to_settle(Plan((CudaGraph(), Resident()))) == 1
    with techniques.applied(plan, pipe, device):
        images(pipe, steps=3)
        assert replays() == 0
        images(pipe, steps=3)
        assert replays() == 3


class Noting(HostLane):
    """Copies at once, and notes what a graph would copy."""

    def __init__(self) -> None:
        self.noted: list[tuple[Tensors, Tensors]] = []

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        self.noted.append((places, sources))
        super().copy(places, sources, after, ready)


def part_of(values: Sequence[float], rank: int, spare: int = 0) -> Part:
    """Layers of one weight each, the last ``spare`` of which the recorded forward left out."""
    layers = [nn.Linear(16, 16, bias=False) for _ in values]
    for layer, value in zip(layers, values, strict=True):
        layer.weight.data.fill_(value)
    units = [Unit((m,), (Weight(m.weight, m.weight.data, m.weight.data),)) for m in layers]
    part = Part(nn.Sequential(*layers), rank, rank == 1, ())
    ran = tuple(units[: len(units) - spare])
    part.division = Division(ran, tuple(units[len(ran) :]), Unit((part.module,), ()))
    part.recorded = True
    return part


def test_what_a_replay_overwrites_is_fetched_again() -> None:
    """A layer that the recorded forward left out lands where the VAE's weights lie."""
    lane, script, x = Noting(), Script(), torch.ones(1, 16)
    denoiser, vae = part_of([1, 2, 3], 1, spare=1), part_of([5, 6], 2)
    pool = Pool(torch.device("cpu"), 4096, lane, script)  # the denoiser, and the VAE's two units
    script.begin(denoiser)
    pool.arrange([denoiser, vae], denoiser)
    assert (len(denoiser.streamed), len(vae.streamed)) == (0, 2)
    wanted = vae.module(x)
    denoiser.module(x)
    assert torch.equal(vae.module(x), wanted)
    moving = Moving(denoiser, pool, lane, lambda _: None)
    moving.begin()
    lane.noted.clear()
    with moving.capturing():
        denoiser.module(x)
    copies = list(lane.noted)
    assert copies
    for _ in range(3):
        moving.begin()
        for places, sources in copies:
            torch._foreach_copy_(places, sources)
        assert torch.equal(vae.module(x), wanted)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_forward_that_is_timed_is_not_captured(
    steps: int, pipes: Pipes, device: str, replays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events would be recorded in the graph, and tell nothing."""
    pipe, timed, timing = pipes["tiny-sd"], [0], engine.timing

    @contextmanager
    def noting(*args: Any) -> Iterator[Any]:
        before = replays()
        with timing(*args) as clock:
            yield clock
        timed[0] += 1
        assert replays() == before
        assert clock.times_s() is not None

    monkeypatch.setattr(engine, "timing", noting)
    with graphed(pipe, 0.5, device):
        for _ in range(5):
            images(pipe, steps=steps)
    assert timed[0] == 1
    assert replays() >= steps


def test_units_are_timed_anew_in_the_first_graph_and_arranged_by_that(
    pipes: Pipes, device: str, plain: Any, replays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the next step replays a graph of the new arrangement."""
    pipe = pipes["tiny-sd"]
    wanted, told = plain("tiny-sd", device), list[list[float]]()
    retimed, moved = engine.Streamer._retimed, list[int]()

    def noted_times(self: Any, part: Part, times_s: list[float]) -> None:
        told.append(times_s)
        before = [unit.offset for unit in part.streamed]
        # as if the first units took all the time
        retimed(self, part, [1.0 if n < 3 else 1e-9 for n in range(len(times_s))])
        moved.append(before != [unit.offset for unit in part.streamed])

    monkeypatch.setattr(engine.Streamer, "_retimed", noted_times)
    with graphed(pipe, 0.5, device):
        for _ in range(4):
            assert_alike(images(pipe), wanted, device)
        assert replays() == 4  # of two steps, the second image is still timed eagerly
    assert moved == [True]
    assert all(seconds > 0 for seconds in told[0])


def test_a_capture_that_fails_leaves_the_weights_right(
    pipes: Pipes, device: str, plain: Any, caplog: pytest.LogCaptureFixture, replays: Any
) -> None:
    """Midway through, when copies were captured that nobody makes."""
    pipe = pipes["tiny-sd"]
    wanted, failing = plain("tiny-sd", device), [False]
    middle = anatomy.denoiser(pipe).mid_block
    capturing = cuda_graph._Graph.__init__

    def fails(self: Any, capturer: Any, weights: Weights, *rest: Any) -> None:
        class Failing:
            arrangement = staticmethod(weights.arrangement)
            begin = staticmethod(weights.begin)

            @staticmethod
            @contextmanager
            def capturing() -> Iterator[None]:
                with weights.capturing():
                    failing[0] = True
                    yield

        capturing(self, capturer, Failing(), *rest)

    def hook(*_: Any) -> None:
        if failing[0]:
            failing[0] = False
            raise RuntimeError("no such operation in a capture")

    with pytest.MonkeyPatch.context() as patch, graphed(pipe, 0.3, device):
        patch.setattr(cuda_graph._Graph, "__init__", fails)
        if device == "cpu":
            patch.setattr(Tape, "capture", _not_capturable(Tape.capture))
        handle = middle.register_forward_pre_hook(hook)
        with caplog.at_level(logging.WARNING, "autofit"):
            for _ in range(4):
                assert_alike(images(pipe), wanted, device)
        handle.remove()
    assert replays() == 0
    assert "no such operation in a capture" in caplog.text


def _not_capturable(capture: Any) -> Any:
    def wrapped(self: Tape, work: Any, weights: Weights) -> Any:
        try:
            return capture(self, work, weights)
        except RuntimeError as error:
            raise cuda_graph.NotCapturable(f"its capture failed: {error}") from error

    return wrapped


def test_an_image_ends_where_no_encoder_runs(pipes: Pipes, device: str, replays: Any) -> None:
    """A prompt that was cached, and a float16 VAE that is cast to decode."""
    pipe = pipes["tiny-sdxl"]
    half = HalfPrecision("float16")
    streamed = Streamed(weights_bytes(pipe, 0.5), UNIT_BYTES)
    plan = Plan((half, CudaGraph(), streamed))
    with techniques.applied(plan, pipe, device), prompts.cached(pipe, weights_move=True):
        images(pipe, steps=4)
        assert replays() == 0
        images(pipe, steps=4)
        assert replays() == 4


def test_steps_alone_are_captured_in_the_end(pipes: Pipes, device: str, replays: Any) -> None:
    """Latents for a prompt that was cached: nothing but the denoiser runs."""
    pipe = pipes["tiny-sd"]
    with graphed(pipe, 0.5, device), prompts.cached(pipe, weights_move=True):
        for _ in range(3):
            pipe("a cat", num_inference_steps=30, width=64, height=64, output_type="latent")
        assert replays() > 0


def test_captures_that_fail_leave_no_clock_behind() -> None:
    """Nothing was marked in it: to read it would be an error in the next step."""
    part = part_of([1, 2, 3], 1)
    lane, script, told = HostLane(), Script(), list[list[float]]()
    pool = Pool(torch.device("cpu"), 2048, lane, script)
    script.begin(part)
    pool.arrange([part], part)
    moving = Moving(part, pool, lane, told.append)
    for _ in range(2):
        moving.arrangement()
        moving.begin()
        with pytest.raises(RuntimeError, match="another order"), moving.capturing():
            part.module[0](torch.ones(1, 16))
    moving.arrangement()
    assert told == []
