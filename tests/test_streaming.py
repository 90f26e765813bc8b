"""Weights that stream: the right ones at the right time, whatever is called and whoever is late."""

from __future__ import annotations

import gc
import linecache
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pipes
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from snapshots import differences, snapshot
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autofit import anatomy, techniques
from autofit.spec import Plan, Technique, Workload
from autofit.streaming import engine, pool, streaming
from autofit.streaming.lanes import CudaLane, HostLane, Tensors, lane_for
from autofit.techniques.guidance import TwoPasses
from autofit.techniques.memory_format import ChannelsLastDenoiser, ChannelsLastVae
from autofit.techniques.placement import Resident
from autofit.techniques.precision import HalfPrecision
from autofit.techniques.streamed import Streamed
from autofit.trial import generate
from autofit.trial.meter import asked_bytes, tracked

CPU = torch.device("cpu")
UNIT_BYTES = 4096  # most layers of the tiny pipelines are larger, so each is a unit
EXACT_CUDA_DB = 60.0  # memory at another address may get another kernel


# ---------------------------------------------------------------- lanes


class Late(HostLane):
    """Copies when the compute waits for it, and not before."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensors, Tensors]] = deque()
        self._asked = self._made = 0

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        self._asked += 1
        self._pending.append((places, sources))
        ready[:] = [self._asked]

    def wait(self, event: list[float]) -> None:
        self._run_until(event[0])

    def drain(self) -> None:
        self._run_until(self._asked)

    def _run_until(self, number: float) -> None:
        while self._made < number:
            torch._foreach_copy_(*self._pending.popleft())
            self._made += 1


@dataclass(frozen=True)
class Asked:
    """One copy: after which mark, from where, and to which places in the pool."""

    due: int
    sources: Tensors
    offsets: tuple[int, ...]

    @property
    def what(self) -> Any:
        return self.due, [s.data_ptr() for s in self.sources], self.offsets


class Early(HostLane):
    """Copies as soon as ``after`` allows. That may be before the host asks for the copy, as where
    the device lags behind; so it needs what an equal run asked for, ``foreseen``."""

    def __init__(self, foreseen: Sequence[Asked] = ()) -> None:
        self.asked: list[Asked] = []
        self.in_time = 0  # copies made when they were asked for, not before
        self.matches = True  # what was foreseen is what was asked for
        self._foreseen = foreseen
        self._pool: Any = None
        self._marks = self._due = self._made = 0

    def mark(self, event: list[float]) -> None:
        self._marks += 1
        event[:] = [self._marks]
        self._run_ahead()

    def between_s(self, first: list[float], last: list[float]) -> float:
        return 1e-3  # the same in each run

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        self._due = max(self._due, after[0])  # none overtakes another
        self._pool = places[0].untyped_storage()
        asked = Asked(self._due, sources, tuple(p.storage_offset() for p in places))
        self.asked.append(asked)
        if self._made < len(self.asked):
            self.in_time += 1
            self._copy(asked)
        elif self._foreseen[len(self.asked) - 1].what != asked.what:
            self.matches = False
        ready[:] = [self._marks]

    def drain(self) -> None:
        self._marks += 1
        self._due = self._marks
        self._run_ahead()

    def _run_ahead(self) -> None:
        while (
            self._pool is not None
            and self._made < len(self._foreseen)
            and self._foreseen[self._made].due <= self._marks
        ):
            self._copy(self._foreseen[self._made])

    def _copy(self, asked: Asked) -> None:
        self._made += 1
        for offset, source in zip(asked.offsets, asked.sources, strict=True):
            place = torch.empty(0, dtype=source.dtype)
            place.set_(self._pool, offset, source.size(), source.stride()).copy_(source)


class Ledger(HostLane):
    """Copies at once, and notes what would go wrong at another speed: by what is ordered before
    what, so for all speeds. Also notes weights used in host memory, where a device has none."""

    def __init__(self, hosts: set[int], is_recording: Callable[[], bool]) -> None:
        self.faults: list[str] = []
        self.copies = 0
        self._hosts, self._is_recording = hosts, is_recording
        self._seen = 0  # the last copy that the compute has waited for
        self._now = self._floor = 0  # operations so far; those that the next copy comes after
        self._reads: list[tuple[int, int, int]] = []  # begin, end, when
        self._writes: list[tuple[int, int, int]] = []  # begin, end, which copy
        self._copying = False

    def mark(self, event: list[float]) -> None:
        super().mark(event)
        event.append(self._now)

    def wait(self, event: list[float]) -> None:
        self._seen = max(self._seen, int(event[1]))

    def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
        self.copies += 1
        self._floor = max(self._floor, after[1])
        self._reads = [r for r in self._reads if r[2] > self._floor]
        for place in places:
            begin, end = _span(place)
            if any(b < end and begin < e for b, e, _ in self._reads):
                self.faults.append("overwritten before it was used")
            self._writes = [w for w in self._writes if w[0] < begin or w[1] > end]
            self._writes.append((begin, end, self.copies))
        self._copying = True
        super().copy(places, sources, after, ready)
        self._copying = False
        ready[:] = [ready[0], self.copies]

    def drain(self) -> None:
        self._floor, self._seen = self._now, self.copies
        self._reads, self._writes = [], []

    def used(self, tensor: torch.Tensor) -> None:
        if self._copying or tensor.numel() == 0:
            return
        if tensor.untyped_storage()._cdata in self._hosts and not self._is_recording():
            self.faults.append("used in host memory")
        begin, end = _span(tensor)
        found = [w for w in self._writes if w[0] < end and begin < w[1]]
        if any(number > self._seen for _, _, number in found):
            self.faults.append("used before it arrived")
        if found:
            self._now += 1
            self._reads.append((begin, end, self._now))


class Watch(TorchDispatchMode):
    """Tells a ledger of all tensors that operations take."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self._ledger.used(leaf)
        return func(*args, **(kwargs or {}))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    spans = zip(tensor.size(), tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in spans)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def watched(net: nn.Module) -> Iterator[Ledger]:
    """Streaming entered inside goes by a ledger. All of the net's weights must move."""
    recordings = [0]
    found = engine.recording

    @contextmanager
    def recording(*args: Any) -> Iterator[Any]:
        recordings[0] += 1
        try:
            with found(*args) as record:
                yield record
        finally:
            recordings[0] -= 1

    hosts = {p.untyped_storage()._cdata for p in net.parameters()}
    ledger = Ledger(hosts, lambda: recordings[0] > 0)
    with pytest.MonkeyPatch.context() as patch, Watch(ledger):
        patch.setattr(engine, "recording", recording)
        patch.setattr(engine, "lane_for", lambda device: ledger)
        yield ledger


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all copies, as they are asked for."""
    sizes: list[int] = []

    def counted(device: torch.device) -> Any:
        lane = lane_for(device)
        found = lane.copy

        def copy_counted(places: Any, sources: Any, after: Any, ready: Any) -> None:
            sizes.append(sum(source.nbytes for source in sources))
            found(places, sources, after, ready)

        lane.copy = copy_counted
        return lane

    monkeypatch.setattr(engine, "lane_for", counted)
    return sizes


# ---------------------------------------------------------------- small modules


class Boom(Exception):
    pass


class Gate(nn.Module):
    """An activation that fails once when it is told to."""

    error: type[BaseException] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return torch.tanh(x)


class Routed(nn.Module):
    """Blocks of several sizes, called as the route says: ``~n`` fails within block n."""

    def __init__(self, widths: Sequence[int] = (64, 128, 16, 256, 32, 128), size: int = 16) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(size, w), Gate(), nn.Linear(w, size)) for w in widths]
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        x: torch.Tensor,
        route: Sequence[int] | None = None,
        error: type[BaseException] = Boom,
    ) -> torch.Tensor:
        for number in range(len(self.blocks)) if route is None else route:
            block = self.blocks[max(number, ~number)]
            if number < 0:
                block[1].error = error
            x = x + block(x)
        return x


class Net(nn.Module):
    """Layers in a row, and what a subclass adds: ``extra`` asks for what runs at times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.add()

    def add(self) -> None:
        pass

    def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.more(x, extra)

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return x


class Shared(Net):
    """One module in two places, and one parameter in two modules."""

    def add(self) -> None:
        self.again = self.layers[1]
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.layers[2].weight

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.tied(self.again(x))


class SharedAtTimes(Net):
    """The first forward does not show that a layer is called twice."""

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.layers[1](x) if extra else x


class TiedAtTimes(Net):
    """The first forward does not run the second layer that has a weight."""

    def add(self) -> None:
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.layers[2].weight

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.tied(x) if extra else x


class Loose(Net):
    """Parameters of a parent, a buffer, and a weight used without its module."""

    def add(self) -> None:
        self.scale = nn.Parameter(torch.randn(16))
        self.register_buffer("shift", torch.randn(16))
        self.other = nn.Linear(16, 16)

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return functional.linear(x * self.scale + self.shift, self.other.weight)


class Attention(Net):
    """torch's own attention uses its output layer's weights without calling it."""

    def add(self) -> None:
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.attention(x[None], x[None], x[None])[0]


class Parametrised(Net):
    """Weights computed from others when they are asked for."""

    def add(self) -> None:
        for layer in self.layers:
            nn.utils.parametrizations.weight_norm(layer)


class Convolutions(Net):
    """Weights whose memory is not in the order of their dimensions, and running statistics."""

    def add(self) -> None:
        convolutions = [
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in "ab"
        ]
        self.convolutions = nn.Sequential(*convolutions).to(memory_format=torch.channels_last)

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.convolutions(x.reshape(1, 4, 4, -1))


class Spare(Net):
    """Layers and a branch that the first forward leaves out."""

    def add(self) -> None:
        self.later = nn.Linear(16, 16)
        self.branch = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.branch(self.later(x)) if extra else x


class Twice(Net):
    """No layer runs once."""

    def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(layer(x)))
        return x


class SpareList(Net):
    """Layers that the first forward leaves out, in a list that is never called itself."""

    def add(self) -> None:
        self.later = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.later[1](self.later[0](x)) if extra else x


class Lookups(Net):
    """Modules that return a view of their weights, used after all of them have run."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(5, 16))

        def forward(self, count: int) -> torch.Tensor:
            return self.rows[:count]

    def add(self) -> None:
        self.tables = nn.ModuleList(self.Table() for _ in range(4))

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        for rows in [table(len(x)) for table in self.tables]:
            x = torch.tanh(x + rows)
        return x


class Inside(Net):
    """Blocks that call a layer which stands elsewhere in the tree."""

    class Block(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.first, self.last, self.elsewhere = nn.Linear(16, 16), nn.Linear(16, 16), [other]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.elsewhere[0](self.first(x)))

    def add(self) -> None:
        self.others = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.blocks = nn.Sequential(*map(self.Block, self.others))

    def more(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.blocks(x)


NETS = [
    pytest.param(net, unit_bytes, id=f"{net.__name__}-{unit_bytes}")
    for net in (Net, Shared, SharedAtTimes, Loose, Attention, Parametrised, Convolutions, Spare)
    for unit_bytes in (1, 3000)  # each layer, about two layers
]
HARD = [
    pytest.param(net, size, id=net.__name__)
    for net, size in ((Twice, 1), (SpareList, 3000), (TiedAtTimes, 1), (Lookups, 1), (Inside, 3000))
]


# ---------------------------------------------------------------- tests on small modules

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
Call = dict[str, Any]


def pipe_of(net: nn.Module) -> Any:
    return SimpleNamespace(components={"unet": net.eval()})


def size_of(net: nn.Module) -> int:
    return sum(p.nbytes for p in net.parameters())


def noted(pipe: Any, device: str) -> dict[str, object]:
    """Everything that must be as it was. For CUDA small weights are moved side by side for good."""
    return snapshot(pipe, memory=device == "cpu")


def results(net: nn.Module, calls: Sequence[Call], x: torch.Tensor = X) -> list[Any]:
    """What each call gives: a tensor, or the class of its error."""
    found: list[Any] = []
    for call in calls:
        try:
            found.append(net(x, **call))
        except (Boom, KeyboardInterrupt) as error:
            found.append(type(error))
    return found


def resident(net: nn.Module, calls: Sequence[Call], device: str = "cpu") -> list[Any]:
    with Resident().applied(pipe_of(net), device):
        return results(net, calls, X.to(device))


def assert_same(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    for one, other in zip(found, wanted, strict=True):
        if not isinstance(other, torch.Tensor):
            assert one is other
        elif other.is_cuda:
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


CALLS: list[Call] = [{}] * 4 + [{"extra": True}] * 2 + [{}, {"extra": True}, {}]


@pytest.mark.parametrize(("net_type", "unit_bytes"), NETS)
def test_every_kind_of_module_gives_its_own_result(
    net_type: type[Net], unit_bytes: int, device: str, copies: list[int]
) -> None:
    net = net_type()
    wanted = resident(net, CALLS, device)
    before = noted(pipe_of(net), device)
    with streaming(pipe_of(net), torch.device(device), None, unit_bytes=unit_bytes):
        assert_same(results(net, CALLS, X.to(device)), wanted)
    assert differences(before, noted(pipe_of(net), device)) == []
    assert len(copies) > len(CALLS)


@pytest.mark.parametrize(("net_type", "unit_bytes"), NETS + HARD)
def test_weights_are_there_when_they_are_used(net_type: type[Net], unit_bytes: int) -> None:
    net = net_type()
    wanted = resident(net, CALLS)
    with watched(net) as ledger, streaming(pipe_of(net), CPU, None, unit_bytes=unit_bytes):
        found = results(net, CALLS)
    assert_same(found, wanted)
    assert ledger.faults == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    routes=st.lists(st.lists(st.integers(-6, 5), max_size=8), max_size=8),
    error=st.sampled_from([Boom, KeyboardInterrupt]),
    share=st.none() | st.floats(0.3, 1.2),
    unit_bytes=st.sampled_from([1, 9000, 20000]),
)
def test_any_routes_through_a_module(
    routes: list[list[int]], error: type[BaseException], share: float | None, unit_bytes: int
) -> None:
    net = Routed()
    calls: list[Call] = [{"route": route, "error": error} for route in routes] + [{}] * 3
    wanted = resident(net, calls)
    before = snapshot(pipe_of(net))
    size_bytes = None if share is None else int(share * size_of(net))
    with watched(net) as ledger:
        try:
            with streaming(pipe_of(net), CPU, size_bytes, unit_bytes=unit_bytes):
                assert_same(results(net, calls), wanted)
        except torch.OutOfMemoryError:
            assume(False)  # what ran twice at first stays, so the least may be nearly all
    assert ledger.faults == []
    assert differences(before, snapshot(pipe_of(net))) == []


def steady(lane: HostLane, net: nn.Module, calls: Sequence[Call], size_bytes: int) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "lane_for", lambda device: lane)
        # a clock that stands still: the same schedule in each run
        patch.setattr(pool, "time", SimpleNamespace(perf_counter=lambda: 0.0))
        with streaming(pipe_of(net), CPU, size_bytes, unit_bytes=1):
            return results(net, calls)


ROUTES: list[Call] = [
    *[{}] * 4,
    *[{"route": route} for route in ([5, 4, 3, 2, 1, 0], [0, 3], [2, 2, 4], [1, ~2, 3], [0, 5])],
    *[{}] * 4,
]


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
class TestTimingOfCopies:
    """Each copy at the latest and at the earliest moment that its events allow."""

    def _net(self, share: float) -> tuple[Routed, list[Any], int]:
        net = Routed()
        return net, resident(net, ROUTES), int(share * size_of(net))

    def test_late_copies_are_waited_for(self, share: float) -> None:
        net, wanted, size_bytes = self._net(share)
        assert_same(steady(Late(), net, ROUTES, size_bytes), wanted)

    def test_early_copies_do_not_overwrite_what_is_in_use(self, share: float) -> None:
        net, wanted, size_bytes = self._net(share)
        first = Early()
        assert_same(steady(first, net, ROUTES, size_bytes), wanted)
        second = Early(first.asked)
        assert_same(steady(second, net, ROUTES, size_bytes), wanted)
        assert second.matches
        assert second.in_time < len(second.asked) / 2  # most were really made early

    def test_a_wait_left_out_is_found(self, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
        net, wanted, size_bytes = self._net(share)
        monkeypatch.setattr(Late, "wait", lambda lane, event: None)
        with pytest.raises(AssertionError):
            assert_same(steady(Late(), net, ROUTES, size_bytes), wanted)

    def test_a_copy_too_early_is_found(self, share: float) -> None:
        net, wanted, size_bytes = self._net(share)
        first = Early()
        steady(first, net, ROUTES, size_bytes)
        hasty = [replace(asked, due=max(1, asked.due - 3)) for asked in first.asked]
        with pytest.raises(AssertionError):
            assert_same(steady(Early(hasty), net, ROUTES, size_bytes), wanted)

    @pytest.mark.parametrize("left_out", ["wait", "mark"])
    def test_the_ledger_finds_both(
        self, share: float, left_out: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        net, _, size_bytes = self._net(share)
        leave_out = {"wait": lambda lane, event: None, "mark": lambda lane, event: _never(event)}
        monkeypatch.setattr(Ledger, left_out, leave_out[left_out])
        with (
            watched(net) as ledger,
            streaming(pipe_of(net), CPU, size_bytes, unit_bytes=1),
        ):
            results(net, ROUTES)
        fault = {"wait": "used before it arrived", "mark": "overwritten before it was used"}
        assert fault[left_out] in ledger.faults


def _never(event: list[float]) -> None:
    event[:] = [0.0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["copies", "compute"])
def test_streams_that_lag(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Routed((1024, 2048, 512, 3072, 1024), size=1024)
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to("cuda:0")
    calls: list[Call] = [{}] * 4 + [{"route": [4, 0, 3, 3, 1]}] + [{}] * 4
    with Resident().applied(pipe_of(net), "cuda:0"):
        wanted = results(net, calls, x)

    class Lagging(CudaLane):
        def copy(self, places: Tensors, sources: Tensors, after: Any, ready: Any) -> None:
            if late == "copies":
                with torch.cuda.stream(self._stream):
                    torch.cuda._sleep(2_000_000)
            super().copy(places, sources, after, ready)

        def wait(self, event: Any) -> None:
            super().wait(event)
            if late == "compute":
                torch.cuda._sleep(2_000_000)

    monkeypatch.setattr(engine, "lane_for", Lagging)
    placement = Streamed(size_of(net) // 2, unit_bytes=2**20)
    with placement.applied(pipe_of(net), "cuda:0"):
        assert_same(results(net, calls, x), wanted)


class LowRank(nn.Module):
    """A layer with what a LoRA adds to it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_low_rank_layers_come_before_and_go_and_come() -> None:
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    low_rank = LowRank(net.layers[2])
    net.layers[2] = low_rank
    wanted, without = resident(net, [{}])[0], resident(plain, [{}])[0]
    before = snapshot(pipe_of(net))
    with watched(net) as ledger, streaming(pipe_of(net), CPU, None, unit_bytes=1):
        assert_same(results(net, [{}] * 4), [wanted] * 4)
        net.layers[2] = low_rank.base
        assert_same(results(net, [{}] * 4), [without] * 4)
        net.layers[2] = low_rank
        assert_same(results(net, [{}] * 4), [wanted] * 4)
    assert ledger.faults == []
    assert differences(before, snapshot(pipe_of(net))) == []


def test_low_rank_layers_come_later() -> None:
    net = Net()
    plain = resident(net, [{}])[0]
    before = snapshot(pipe_of(net))
    with watched(net) as ledger, streaming(pipe_of(net), CPU, None, unit_bytes=1):
        assert_same(results(net, [{}] * 4), [plain] * 4)
        found = net.layers[2]
        net.layers[2] = LowRank(found)
        changed = results(net, [{}] * 4)
        wrapper, net.layers[2] = net.layers[2], found
    assert ledger.faults == []
    assert differences(before, snapshot(pipe_of(net))) == []
    net.layers[2] = wrapper
    assert_same(changed, resident(net, [{}] * 4))
    assert not torch.equal(changed[0], plain)


def test_the_callers_hooks_run_and_stay() -> None:
    net = Net()
    net.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] * layer.weight.mean(),))
    net.layers[3].register_forward_hook(lambda layer, args, out: out @ layer.weight)
    wanted = resident(net, CALLS)
    before = snapshot(pipe_of(net))
    with watched(net) as ledger, streaming(pipe_of(net), CPU, None, unit_bytes=1):
        assert_same(results(net, CALLS), wanted)
    assert ledger.faults == []
    assert differences(before, snapshot(pipe_of(net))) == []


class Names(TorchDispatchMode):
    """The operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_first_forward_takes_the_same_kernels() -> None:
    net, x = Net().eval(), torch.randn(2, 16, 8).transpose(1, 2)
    with Names() as wanted:
        net(x)
    with streaming(pipe_of(net), CPU, None, unit_bytes=1), Names() as first:
        net(x)
    assert first.found.count("aten.bmm.default") == wanted.found.count("aten.bmm.default")


@pytest.mark.parametrize("first", [0, 1])
def test_inference_mode_and_no_grad_take_turns(first: int, device: str) -> None:
    net = Spare()
    wanted = resident(net, CALLS, device)
    before = noted(pipe_of(net), device)
    x = X.to(device)
    with streaming(pipe_of(net), torch.device(device), None, unit_bytes=1):
        for number, call in enumerate(CALLS):
            with torch.inference_mode(number % 2 == first):
                assert_same(results(net, [call], x), [wanted[number]])
    assert differences(before, noted(pipe_of(net), device)) == []


@pytest.mark.parametrize("net_type", [Loose, Spare, Shared])
def test_too_small_a_pool_says_what_it_lacks(net_type: type[Net]) -> None:
    net = net_type()
    before = snapshot(pipe_of(net))

    def lacks(size_bytes: int) -> int:
        """The bytes asked for, the same at a second try; 0 where the size is enough."""
        with streaming(pipe_of(net), CPU, size_bytes, unit_bytes=1):
            try:
                results(net, [{}])
            except torch.OutOfMemoryError as error:
                with pytest.raises(torch.OutOfMemoryError, match=re.escape(str(error))):
                    results(net, [{}])
                return asked_bytes(error)
            return 0

    least_bytes = 1000 + lacks(1000)
    assert [lacks(least_bytes), lacks(least_bytes - 1)] == [0, 1]
    assert least_bytes < size_of(net)
    assert differences(before, snapshot(pipe_of(net))) == []


# ---------------------------------------------------------------- interrupts

FOLDER = str(Path(engine.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the streaming code, counted over ``files``.

    Not at a ``with``: on the way out Python shows that line again, where a signal never comes.
    """

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    @contextmanager
    def pending(self) -> Iterator[None]:
        found = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(found)

    def _called(self, frame: Any, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(FOLDER) else None

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not text.lstrip().startswith("with "):
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._line


class Image(nn.Module):
    """A pipe of three parts. Its VAE is entered by the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.unet = Routed((16, 32)), Routed((64, 128, 16))
        self.vae = nn.Module()
        self.vae.decoder = Routed((32, 64))

    @property
    def components(self) -> dict[str, nn.Module]:
        return dict(self.named_children())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vae.decoder(self.unet(self.unet(self.text_encoder(x))))


def interrupted(at: int, warm: int) -> int:
    """Interrupt an image after ``warm`` others, go on, and check all. Returns the lines seen."""
    pipe = Image().eval()
    wanted = pipe(X)
    before = snapshot(pipe)
    interrupt = Interrupt(at)
    with watched(pipe) as ledger, streaming(pipe, CPU, None, unit_bytes=1):
        results(pipe, [{}] * warm)
        with interrupt.pending():
            stopped = results(pipe, [{}])
        after = results(pipe, [{}] * 2)
    assert_same(after, [wanted] * 2)
    assert_same(stopped, [KeyboardInterrupt if at <= interrupt.lines else wanted])
    assert ledger.faults == []
    assert differences(before, snapshot(pipe)) == []
    return interrupt.lines


@pytest.mark.parametrize(("warm", "stride"), [(0, 307), (3, 31)], ids=["learning", "steady"])
def test_an_interrupt_anywhere_leaves_it_usable(warm: int, stride: int) -> None:
    lines = interrupted(sys.maxsize, warm)
    assert lines > 100
    for at in range(1, lines, stride):
        interrupted(at, warm)


# ---------------------------------------------------------------- pipelines


def images(pipe: Any, width: int = 64, height: int = 64, steps: int = 2) -> NDArray[np.float32]:
    found: NDArray[np.float32] = generate(pipe, Workload(width, height, steps, passes=2), steps)
    return found


def assert_alike(found: NDArray[np.float32], wanted: NDArray[np.float32], device: str) -> None:
    if device == "cpu":
        assert np.array_equal(found, wanted)
        return
    error = float(np.square(found.astype(np.float64) - wanted).mean())
    assert error <= 10 ** (-EXACT_CUDA_DB / 10)


def settled_bytes(pipe: Any) -> int:
    return sum(b.nbytes for m in anatomy.modules(pipe).values() for b in m.buffers())


def run_bytes(pipe: Any) -> int:
    """Of all weights that an image needs: a VAE's encoder is not among them."""
    modules = {**anatomy.modules(pipe), "vae": anatomy.vae(pipe).decoder}
    return sum(size_of(module) for module in modules.values())


@pytest.fixture(scope="session")
def plain(pipes: Pipes) -> Callable[..., NDArray[np.float32]]:
    """The images of a pipe that is resident, made once."""
    made: dict[Any, NDArray[np.float32]] = {}

    def images_of(name: str, device: str, *size: int) -> NDArray[np.float32]:
        if (name, device, size) not in made:
            with Resident().applied(pipes[name], device), torch.no_grad():
                made[name, device, size] = images(pipes[name], *size)
        return made[name, device, size]

    return images_of


@pytest.mark.parametrize("share", [None, 0.5, 0.9, 2.0])
def test_images_are_the_resident_pipes_at_every_residency(
    share: float | None, model: str, pipes: Pipes, device: str, copies: list[int], plain: Any
) -> None:
    pipe = pipes[model]
    wanted = plain(model, device)
    before = noted(pipe, device)
    size_bytes = None if share is None else int(share * run_bytes(pipe)) + settled_bytes(pipe)
    with Streamed(size_bytes, UNIT_BYTES).applied(pipe, device):
        for _ in range(3):
            copies.clear()
            assert_alike(images(pipe), wanted, device)
    assert differences(before, noted(pipe, device)) == []
    # what is not there at the start of an image must come
    assert sum(copies) >= (1 - (0.5 if share is None else share)) * run_bytes(pipe)
    assert (sum(copies) == 0) == (share == 2.0)


@contextmanager
def growth(pipe: Any, device: str) -> Iterator[Callable[[], int]]:
    """Count the bytes that live on the device and did not before, the pipe's weights apart."""
    with tracked(pipe, torch.device(device), None) as tracker:

        def held_bytes() -> int:
            gc.collect()
            return tracker.live_bytes if tracker else torch.cuda.memory_allocated()

        found_bytes = held_bytes()
        gc.freeze()  # what there was is not looked at again: to collect takes no time
        try:
            yield lambda: held_bytes() - found_bytes
        finally:
            gc.unfreeze()


def test_twenty_calls_of_changing_sizes_do_not_grow(pipes: Pipes, device: str, plain: Any) -> None:
    pipe = pipes["tiny-sd"]
    sizes = [(64, 64, 2), (96, 64, 1), (64, 96, 1), (64, 64, 1)]
    wanted = [plain("tiny-sd", device, *size) for size in sizes]
    held: list[int] = []
    with (
        growth(pipe, device) as grown,
        Streamed(run_bytes(pipe) // 2, UNIT_BYTES).applied(pipe, device),
    ):
        for number in range(20):
            assert_alike(images(pipe, *sizes[number % 4]), wanted[number % 4], device)
            held.append(grown())
    assert held[8:] == held[4:-4]
    assert held[-1] > run_bytes(pipe) / 4  # the pool was seen


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("tiny-sdxl", (HalfPrecision("float16"),)),  # its VAE is cast to float32 to decode
        ("tiny-flux", (HalfPrecision("bfloat16"),)),
        ("tiny-sd3", (HalfPrecision("float16"), TwoPasses())),
        ("tiny-sd", (ChannelsLastDenoiser(), ChannelsLastVae())),
        ("tiny-sd", (TwoPasses(),)),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(t.label for t in value),
)
def test_with_other_techniques(
    name: str, others: tuple[Technique, ...], pipes: Pipes, device: str, copies: list[int]
) -> None:
    pipe = pipes[name]
    with techniques.applied(Plan((*others, Resident())), pipe, device):
        wanted = images(pipe)
    before = noted(pipe, device)
    with techniques.applied(Plan((*others, Streamed(None, UNIT_BYTES))), pipe, device):
        found = [images(pipe)]
        for _ in range(2):
            copies.clear()
            found.append(images(pipe))
    assert differences(before, noted(pipe, device)) == []
    assert sum(copies) > run_bytes(pipe) / 8
    for image in found:
        assert_alike(image, wanted, device)


@pytest.mark.parametrize("share", [0.3, 1.2])
def test_holds_no_more_than_it_was_given(share: float, pipes: Pipes, device: str) -> None:
    pipe = pipes["tiny-sd"]
    size_bytes = int(share * run_bytes(pipe))
    with growth(pipe, device) as grown, Streamed(size_bytes, UNIT_BYTES).applied(pipe, device):
        for _ in range(3):
            images(pipe)
        held_bytes = grown() + (settled_bytes(pipe) if device == "cpu" else 0)
    # the scheduler holds a few kilobytes, and on CUDA each small tensor takes 512 bytes
    assert 0.9 * size_bytes < held_bytes <= size_bytes + 2**16
