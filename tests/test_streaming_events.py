"""The events that order copies and compute: enough of them, at whatever speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streaming_lanes import Early, Late, Ledger, watched
from streaming_nets import CPU, Call, Routed, assert_same, pipe_of, resident, results, size_of
from torch import nn

from autofit.streaming import engine, pool, streaming
from autofit.streaming.lanes import CudaLane, HostLane, Tensors
from autofit.techniques.placement import Resident
from autofit.techniques.streamed import Streamed

pytestmark = pytest.mark.usefixtures("without_gradients")


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
        leave_out = {"wait": lambda lane, event: None, "mark": _never}
        monkeypatch.setattr(Ledger, left_out, leave_out[left_out])
        with (
            watched(net) as ledger,
            streaming(pipe_of(net), CPU, size_bytes, unit_bytes=1),
        ):
            results(net, ROUTES)
        fault = {"wait": "used before it arrived", "mark": "overwritten before it was used"}
        assert fault[left_out] in ledger.faults


def _never(lane: Ledger, event: list[float]) -> None:
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
