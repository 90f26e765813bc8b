"""The denoiser as a CUDA graph: its logic, with a stand-in for the capture itself."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Pipes
from samples import device as sample_device
from test_capture import CASES, latents_of_each_step
from test_execution import Holder, _latents, _pixart
from torch import nn

from autofit.architectures import build
from autofit.probe.pipeline import facts
from autofit.spec import Fidelity, Measurement, Phase, Plan, Workload
from autofit.techniques import KINDS, cuda_graph
from autofit.techniques.capture import NotCapturable, Weights
from autofit.techniques.cuda_graph import MAX_GRAPHS, CudaGraph
from autofit.techniques.guidance import TwoPasses
from autofit.trial import InProcess, Request


class Capturer:
    """A replay runs the work again and writes its outputs where those of the capture are."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = self.releases = 0
        self.outputs: list[torch.Tensor] = []
        self.fails: Callable[[], None] = lambda: None

    def is_capturing(self) -> bool:
        return False

    def capture(self, work: Callable[[], Any], weights: Weights) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        self.fails()
        weights.begin()
        with weights.capturing():
            outputs, spec = work()
        self.outputs += outputs

        def replay() -> None:
            self.replays += 1
            for mine, new in zip(outputs, work()[0], strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(new)

        return replay, (outputs, spec)

    def run(self, work: Callable[[], Any]) -> Any:
        return work()

    def release(self) -> None:
        self.releases += 1
        self.outputs.clear()


@pytest.fixture
def capturer(monkeypatch: pytest.MonkeyPatch) -> Capturer:
    made = Capturer(torch.device("cpu"))
    monkeypatch.setattr(cuda_graph, "Capturer", lambda device: made)
    return made


@pytest.fixture
def doubler() -> nn.Module:
    return Doubler()


class Doubler(nn.Module):
    """Not quite a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: Any = 2, extra: Any = None) -> dict[str, Any]:
        return {"x": self.layer(x) * (scale if isinstance(scale, int) else 1), "extra": 7}


def test_a_graph_gives_the_eager_output(model: str, pipes: Pipes, capturer: Capturer) -> None:
    pipe = pipes[model]
    expected = [_latents(pipe, **case) for case in CASES]
    assert not torch.equal(expected[0], expected[1])
    with CudaGraph().applied(pipe, "cpu"):
        got = [_latents(pipe, **case) for case in CASES]
    assert all(map(torch.equal, got, expected))
    assert 2 <= capturer.captures <= MAX_GRAPHS  # two sizes
    assert capturer.replays > capturer.captures


@torch.no_grad()
def test_a_caller_keeps_what_it_was_given(doubler: Any, capturer: Capturer) -> None:
    inputs = [torch.randn(2, 4) for _ in range(3)]
    before, expected = [x.clone() for x in inputs], [doubler(x)["x"] for x in inputs]
    with CudaGraph().applied(Holder(doubler), "cpu"):
        outputs = [doubler(x) for x in inputs]
        assert capturer.captures == 1
        assert all(o["x"].data_ptr() != capturer.outputs[0].data_ptr() for o in outputs)
        outputs[0]["x"].zero_()
        assert torch.equal(doubler(inputs[1])["x"], expected[1])
    assert [list(o) for o in outputs] == [["x", "extra"]] * 3
    assert all(o["extra"] == 7 for o in outputs)
    assert all(map(torch.equal, [o["x"] for o in outputs[1:]], expected[1:]))
    assert all(map(torch.equal, inputs, before))


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "captures"),
    [
        (lambda x: ((torch.ones_like(x),), {}), 1),
        (lambda x: ((x[:1].expand(2, 4).clone(),), {}), 1),
        (lambda x: ((x,), {"scale": 3}), 2),
        (lambda x: ((x,), {"scale": 2.0}), 2),
        (lambda x: ((), {"x": x}), 2),
        (lambda x: ((torch.ones(3, 4),), {}), 2),
        (lambda x: ((x.t().contiguous().t(),), {}), 2),
        (lambda x: ((x,), {"extra": {"y": x}}), 2),
        (lambda x: ((x,), {"extra": {1, 2}}), 1),  # has no hash, and runs eagerly
    ],
    ids=["values", "memory", "constant", "type", "keyword", "shape", "strides", "tree", "set"],
)
def test_a_graph_holds_for_one_signature(
    change: Any, captures: int, doubler: Any, capturer: Capturer
) -> None:
    x = torch.randn(2, 4)
    args, kwargs = change(x)
    expected = doubler(*args, **kwargs)["x"]
    with CudaGraph().applied(Holder(doubler), "cpu"):
        doubler(x)
        torch.testing.assert_close(doubler(*args, **kwargs)["x"], expected)
    assert capturer.captures == captures


@torch.no_grad()
def test_beyond_the_bound_it_runs_eagerly(
    doubler: Any, capturer: Capturer, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 4)
    expected = [doubler(x, scale)["x"] for scale in range(10)]
    with CudaGraph().applied(Holder(doubler), "cpu"):
        for _ in range(2):
            got = [doubler(x, scale)["x"] for scale in range(10)]
            assert all(map(torch.equal, got, expected))
    assert capturer.captures == MAX_GRAPHS
    assert capturer.replays == 2 * MAX_GRAPHS
    assert len(caplog.records) == 1


@torch.no_grad()
def test_what_cannot_be_captured_runs_eagerly_and_is_told_once(
    doubler: Any, capturer: Capturer, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise NotCapturable("it waits for the device")

    x = torch.randn(2, 4)
    expected = doubler(x)["x"]
    with caplog.at_level(logging.WARNING), CudaGraph().applied(Holder(doubler), "cpu"):
        capturer.fails = fails
        assert all(torch.equal(doubler(x)["x"], expected) for _ in range(3))
        assert (capturer.captures, capturer.replays) == (1, 0)
        capturer.fails = lambda: None
        doubler(x, 3)
        assert (capturer.captures, capturer.replays) == (2, 1)
    assert [r.getMessage() for r in caplog.records] == [
        "Doubler runs eagerly, not as a CUDA graph: it waits for the device"
    ]


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_a_trial_says_what_could_not_be_captured(
    placement: str, pipes: Pipes, capturer: Capturer
) -> None:
    """Without the folders of this machine: a profile may go to others."""

    def fails() -> None:
        raise NotCapturable("/home/me/lib/unet.py:12 waits for the device during a forward")

    plan = Plan((CudaGraph(), KINDS[placement]()))
    request = Request(plan, Workload(64, 64, 6, passes=2), None)
    measurer = InProcess(pipes["tiny-sd"], "cpu")
    captured = measurer.measure(request)
    capturer.fails = fails
    eager = measurer.measure(request)
    assert isinstance(captured, Measurement)
    assert isinstance(eager, Measurement)
    assert captured.fallbacks == ()
    assert eager.fallbacks == (
        "UNet2DConditionModel runs eagerly, not as a CUDA graph:"
        " unet.py:12 waits for the device during a forward",
    )


@torch.no_grad()
def test_no_memory_is_told_as_such(doubler: Any, capturer: Capturer) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    capturer.fails = fails
    with (
        CudaGraph().applied(Holder(doubler), "cpu"),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
    ):
        doubler(torch.randn(2, 4))
    assert "forward" not in vars(doubler)


def test_gradients_and_casts_run_eagerly(doubler: Any, capturer: Capturer) -> None:
    x = torch.randn(2, 4)
    with CudaGraph().applied(Holder(doubler), "cpu"):
        assert doubler(x)["x"].grad_fn is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert doubler(x)["x"].dtype == torch.bfloat16
        told = CudaGraph().fallbacks(Holder(doubler))
    assert capturer.captures == 0
    assert [text.partition(": ")[2] for text in told] == [
        "its call records gradients, as outside torch.no_grad()",
        "its call is under autocast",
    ]


def test_a_graph_of_inference_mode_is_good_outside_it(doubler: Any, capturer: Capturer) -> None:
    x = torch.randn(2, 4)
    with CudaGraph().applied(Holder(doubler), "cpu"):
        with torch.inference_mode():
            first = doubler(x.clone())["x"]
        with torch.no_grad():
            second = doubler(x)["x"]
    assert capturer.captures == 1
    assert torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("how", ["data", "parameter", "module"])
def test_weights_that_moved_end_the_graphs(
    how: str, doubler: Any, capturer: Capturer, caplog: pytest.LogCaptureFixture
) -> None:
    x, other = torch.randn(2, 4), nn.Linear(4, 4)
    with CudaGraph().applied(Holder(doubler), "cpu"):
        doubler(x)
        if how == "data":
            doubler.layer.weight.data = other.weight.data
        elif how == "parameter":
            doubler.layer.weight = other.weight
        else:
            doubler.layer = other
        assert capturer.releases == 0
        for _ in range(2):
            torch.testing.assert_close(doubler(x)["x"], 2 * doubler.layer(x))
        assert (capturer.captures, capturer.replays, capturer.releases) == (1, 1, 1)
    assert ["weights moved" in r.getMessage() for r in caplog.records] == [True]


@torch.no_grad()
def test_weights_changed_in_place_are_followed(doubler: Any, capturer: Capturer) -> None:
    x = torch.randn(2, 4)
    with CudaGraph().applied(Holder(doubler), "cpu"):
        doubler(x)
        doubler.layer.weight.mul_(2)
        doubler(x)
    assert capturer.replays == 2


@torch.no_grad()
def test_undo_drops_the_graphs(capturer: Capturer) -> None:
    model, inputs = _pixart()
    before = {m: dict(vars(m)) for m in model.modules()}
    with CudaGraph().applied(Holder(model), "cpu"):
        output = model(**inputs)
        assert type(output) is type(type(model).forward(model, **inputs))
        assert any(isinstance(o, cuda_graph._Graph) for o in gc.get_objects())
    assert {m: dict(vars(m)) for m in model.modules()} == before
    assert capturer.releases == 1
    gc.collect()
    assert not any(isinstance(o, cuda_graph._Graph) for o in gc.get_objects())


def test_two_passes_replay_one_graph(pipes: Pipes, capturer: Capturer) -> None:
    pipe = pipes["tiny-sd"]
    with TwoPasses().applied(pipe, "cpu"):
        expected = _latents(pipe)
    with CudaGraph().applied(pipe, "cpu"), TwoPasses().applied(pipe, "cpu"):
        assert torch.equal(_latents(pipe), expected)
    assert capturer.captures == 1


def test_compiled_blocks_are_captured(capturer: Capturer, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", eager)
    pipe = build("tiny-sd")
    before = {m: dict(vars(m)) for m in pipe.unet.modules()}
    expected = _latents(pipe)
    with CudaGraph(compiled=True).applied(pipe, "cpu"):
        assert any("forward" in vars(m) for m in pipe.unet.modules() if m is not pipe.unet)
        torch.testing.assert_close(_latents(pipe), expected, rtol=1e-3, atol=1e-3)
    assert capturer.captures >= 1
    assert {m: dict(vars(m)) for m in pipe.unet.modules()} == before


def test_what_it_says_of_itself(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, workload = facts(pipes["tiny-sd"]), Workload(64, 64, 4)
    plain, compiled = CudaGraph(), CudaGraph(compiled=True)
    assert (plain.fidelity, compiled.fidelity) == (Fidelity.EXACT, Fidelity.NUMERIC)
    assert (plain.label, compiled.label) == ("cuda_graph", "cuda_graph(compiled)")
    for technique in (plain, compiled):
        assert technique.effects(pipeline, workload)[Phase.STEP].stays
        reason = technique.why_not(pipeline, sample_device(kind="cpu"), workload)
        assert reason == "CUDA graphs need CUDA"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plain.why_not(pipeline, sample_device(), workload) is None
    assert "triton" in (compiled.why_not(pipeline, sample_device(), workload) or "")


def test_a_callback_keeps_the_latents_of_each_step(pipes: Pipes, capturer: Capturer) -> None:
    pipe = pipes["tiny-sd"]
    expected = latents_of_each_step(pipe)
    with CudaGraph().applied(pipe, "cpu"):
        got = latents_of_each_step(pipe)
    assert capturer.replays == len(got)
    assert all(map(torch.equal, got, expected))
    assert not torch.allclose(got[0], got[1], atol=1e-2)
