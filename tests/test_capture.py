"""Capturing a CUDA graph: the order of the calls with a stand-in for CUDA, the rest on CUDA."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Pipes
from test_execution import _denoiser, _latents

from autofit.techniques import capture
from autofit.techniques.capture import Capturer, NotCapturable, Still
from autofit.techniques.cuda_graph import MAX_GRAPHS, CudaGraph
from autofit.techniques.placement import Resident

CASES: list[dict[str, Any]] = [{}, {"prompt": "two dogs in the snow"}, {"steps": 5}, {"size": 128}]


def latents_of_each_step(pipe: Any) -> list[torch.Tensor]:
    """As a callback is handed them, kept to the end."""
    found: list[torch.Tensor] = []

    def keep(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        found.append(given["latents"])
        return given

    generator = torch.Generator().manual_seed(0)
    pipe("a cat", width=64, height=64, num_inference_steps=5, generator=generator,
         output_type="latent", callback_on_step_end=keep)  # fmt: skip
    return found


class Cuda:
    """As much of torch as a capture calls, written down."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self, ends_allocation: bool = True) -> None:
        self.calls: list[str] = []
        self._ends_allocation = ends_allocation
        stream = SimpleNamespace(wait_stream=lambda other: None, device=SimpleNamespace(index=0))
        self.cuda: Any = SimpleNamespace(
            Stream=lambda device: stream,
            current_stream=lambda device: stream,
            stream=lambda stream: self._noted("stream"),
            empty_cache=lambda: None,
            synchronize=lambda device: self.calls.append("synchronize"),
            CUDAGraph=self._graph,
            graph_pool_handle=lambda: "a pool",
            graph=lambda graph, pool, stream, capture_error_mode: self._noted(
                f"capture into {pool}, {capture_error_mode}"
            ),
            get_sync_debug_mode=lambda: 0,
            set_sync_debug_mode=lambda mode: self.calls.append(f"sync {mode}"),
        )
        self._C = SimpleNamespace(
            _cuda_clearCublasWorkspaces=lambda: self.calls.append("clear"),
            _cuda_beginAllocateCurrentThreadToPool=lambda device, pool: self.calls.append(
                f"begin {pool}"
            ),
            _cuda_endAllocateToPool=self._end_allocation,
            _cuda_releasePool=lambda device, pool: self.calls.append(f"release {pool}"),
        )

    nn = torch.nn
    Tensor = torch.Tensor
    clone = torch.clone

    def ones(self, *size: int, device: Any) -> torch.Tensor:
        self.calls.append("workspaces")
        return torch.ones(size)

    def addmm(self, *given: torch.Tensor) -> torch.Tensor:
        return torch.addmm(*given)

    def zeros(self, *size: int, device: Any) -> torch.Tensor:
        self.calls.append("heal")
        return torch.zeros(size)

    def _graph(self) -> Any:
        return SimpleNamespace(
            pool=lambda: "the first graph's pool",
            replay=lambda: self.calls.append("replay"),
            reset=lambda: self.calls.append("reset"),
        )

    def _end_allocation(self, device: int, pool: str) -> None:
        if not self._ends_allocation:
            raise RuntimeError("not currently recording to this pool")
        self.calls.append(f"end {pool}")

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        self.calls.append(name)
        yield
        self.calls.append(f"end of {name}")


class Noted(Still):
    """Weights that note when they are asked to be where they must."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def begin(self) -> None:
        self._calls.append("begin")

    @contextmanager
    def capturing(self) -> Iterator[None]:
        self._calls.append("weights")
        yield
        self._calls.append("end of weights")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Cuda:
    made = Cuda(getattr(request, "param", True))
    monkeypatch.setattr(capture, "torch", made)
    monkeypatch.setattr(capture, "_FAILED", [])
    return made


def test_work_is_rehearsed_watched_and_captured(cuda: Cuda) -> None:
    capturer, weights = Capturer(torch.device("cuda:0")), Noted(cuda.calls)
    replay, result = capturer.capture(lambda: cuda.calls.append("work") or len(cuda.calls), weights)
    assert cuda.calls == [
        *("stream", "work", "sync warn", "work", "sync 0", "begin", "clear"),
        *("capture into a pool, thread_local", "weights", "work", "end of weights"),
        *("end of capture into a pool, thread_local", "clear", "end of stream", "workspaces"),
    ]
    assert result == 10
    replay()
    capturer.capture(lambda: None, weights)
    assert "capture into the first graph's pool, thread_local" in cuda.calls
    capturer.release()
    assert cuda.calls[-3:] == ["synchronize", "reset", "reset"]
    capturer.release()
    assert cuda.calls[-3:] == ["synchronize", "reset", "reset"]


def test_the_next_work_runs_in_the_memory_of_the_graphs(cuda: Cuda) -> None:
    capturer, seen = Capturer(torch.device("cuda:0")), torch.ones(2)
    assert capturer.run(lambda: seen) is seen  # none was captured
    capturer.capture(lambda: None, Still())
    pool = "the first graph's pool"
    shared = ["clear", f"begin {pool}", "work", f"end {pool}", f"release {pool}", "clear"]
    for use in (capturer.run, lambda work: capturer.capture(work, Still())):
        cuda.calls.clear()
        use(lambda: cuda.calls.append("work"))
        calls = [call for call in cuda.calls if not call.startswith("sync")]
        first = [call for call, before in zip(calls, ["", *calls], strict=False) if call != before]
        assert first[1 : 1 + len(shared)] == shared  # a capture is rehearsed twice
    copied = capturer.run(lambda: {"sample": seen})["sample"]
    assert copied is not seen
    assert copied.equal(seen)


def test_work_that_waits_is_not_captured(cuda: Cuda) -> None:
    def work() -> None:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    with (
        pytest.warns(UserWarning, match="synchronizing"),  # the first rehearsal's
        pytest.raises(NotCapturable, match=r"test_capture\.py:\d+ waits for the device"),
    ):
        Capturer(torch.device("cuda:0")).capture(work, Still())
    assert cuda.calls == ["stream", "sync warn", "sync 0"]


def _fails_in_capture(cuda: Cuda, error: BaseException) -> Any:
    def work() -> None:
        if cuda.calls[-1].startswith("capture"):
            raise error

    return work


@pytest.mark.parametrize("cuda", [True, False], ids=["before 2.12", "since"], indirect=True)
def test_a_capture_that_fails_is_repaired(cuda: Cuda) -> None:
    error = RuntimeError("operation not permitted when stream is capturing\nand more")
    with pytest.raises(NotCapturable, match=r"failed: operation not permitted .* capturing$"):
        Capturer(torch.device("cuda:0")).capture(_fails_in_capture(cuda, error), Still())
    after = cuda.calls[cuda.calls.index("capture into a pool, thread_local") + 1 :]
    ended = ["end a pool", "release a pool"] if cuda._ends_allocation else []
    healed = ("capture into None, thread_local", "heal", "end of capture into None, thread_local")
    assert after == ["clear", *ended, *healed]
    assert len(capture._FAILED) == bool(ended)


def test_no_memory_in_a_capture_is_no_fault_of_the_work(cuda: Cuda) -> None:
    error = torch.OutOfMemoryError("Tried to allocate 2 GiB")
    with pytest.raises(torch.OutOfMemoryError):
        Capturer(torch.device("cuda:0")).capture(_fails_in_capture(cuda, error), Still())
    assert "heal" not in cuda.calls


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("an operation that a capture refuses"), NotCapturable),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), torch.OutOfMemoryError),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt),
    ],
)
def test_what_ended_a_capture_counts_not_what_its_end_says_of_it(
    error: BaseException, raised: type[BaseException], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a capture that is invalid raises an error of its own."""

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        cuda.calls.append("capture")
        try:
            yield
        except BaseException:
            raise RuntimeError("capture_end: the capture was invalidated") from None

    monkeypatch.setattr(cuda.cuda, "graph", graph)
    monkeypatch.setattr(capture, "_repaired", lambda *_: cuda.calls.append("repaired"))
    with pytest.raises(raised, match=str(error)):
        Capturer(torch.device("cuda:0")).capture(_fails_in_capture(cuda, error), Still())
    assert "repaired" in cuda.calls


# ---------------------------------------------------------------- on CUDA


@pytest.fixture
def resident(model: str, pipes: Pipes) -> Iterator[Any]:
    with Resident().applied(pipes[model], "cuda:0"):
        yield pipes[model]


def _usable() -> bool:
    """Random numbers, pinned memory, freeing memory and another capture work."""
    torch.randn(8, device="cuda:0").sum().item()
    torch.zeros(8).pin_memory()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    x, graph = torch.zeros(1, device="cuda:0"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
    graph.replay()
    on_default = torch.cuda.current_stream() == torch.cuda.default_stream()
    return on_default and x.item() == 1.0


@pytest.mark.gpu
def test_a_graph_gives_the_eager_output(resident: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = [_latents(resident, **case) for case in CASES]
    each = latents_of_each_step(resident)
    with CudaGraph().applied(resident, "cuda:0"):
        got = [_latents(resident, **case) for case in (*CASES, *CASES)]
        kept = latents_of_each_step(resident)
    for mine, want in zip([*got, *kept], [*expected, *expected, *each], strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-3)
    assert [r for r in caplog.records if r.name.startswith("autofit")] == []


@pytest.mark.gpu
def test_a_replay_runs_no_python(resident: Any) -> None:
    calls: list[int] = []
    layer = next(m for m in _denoiser(resident).modules() if isinstance(m, torch.nn.Linear))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    with CudaGraph().applied(resident, "cuda:0"):
        _latents(resident)
        captured = len(calls)
        _latents(resident)
    handle.remove()
    assert 3 <= captured <= 3 * MAX_GRAPHS
    assert len(calls) == captured


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["waits", "fails"])
def test_cuda_is_usable_after_what_cannot_be_captured(
    how: str, resident: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """``synchronize`` is not seen beforehand, and fails in the capture."""

    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        if how == "fails":
            torch.cuda.synchronize()
        else:
            output.flatten()[0].item()

    expected = _latents(resident)
    layer = next(m for m in _denoiser(resident).modules() if isinstance(m, torch.nn.Linear))
    handle = layer.register_forward_hook(hook)
    with CudaGraph().applied(resident, "cuda:0"), caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(_latents(resident), expected, rtol=1e-3, atol=1e-3)
        assert _usable()
        told = CudaGraph().fallbacks(resident)
    handle.remove()
    assert told
    assert all(" runs eagerly, not as a CUDA graph: " in line for line in told)
    assert not any("/" in line for line in told)
    assert [r for r in caplog.records if r.name.startswith("autofit")]
    assert _usable()
    with CudaGraph().applied(resident, "cuda:0"):
        torch.testing.assert_close(_latents(resident), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_memory_of_graphs_stays_until_the_undo(resident: Any) -> None:
    def reserved_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # as a capture does
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved("cuda:0")

    _latents(resident)
    before = reserved_bytes()
    for _ in range(2):
        with CudaGraph().applied(resident, "cuda:0"):
            _latents(resident)
            assert reserved_bytes() > before
        # cuBLAS keeps a workspace for each stream that it was called on
        assert reserved_bytes() <= before + 2**26


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny-sdxl"])
def test_a_smaller_size_needs_no_memory_beside_the_larger_one(resident: Any) -> None:
    """Captured, or run as it is: what the larger one's graph reserved serves both."""

    def peak_bytes(size: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        images[size] = _latents(resident, size=size).cpu()
        return torch.cuda.max_memory_reserved()

    images: dict[int, torch.Tensor] = {}
    with CudaGraph().applied(resident, "cuda:0"):
        large, *sizes = [64 * n for n in range(MAX_GRAPHS + 2, 0, -1)]
        _latents(resident, size=large)
        large_bytes = peak_bytes(large)  # a replay
        for size in sizes:
            assert peak_bytes(size) <= large_bytes + 2**22, size
        for size, image in list(images.items()):
            assert torch.equal(_latents(resident, size=size).cpu(), image), size
