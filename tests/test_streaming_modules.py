"""Every kind of module gives its own results while its weights stream."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from snapshots import differences, snapshot
from streaming_lanes import watched
from streaming_nets import (
    CALLS,
    CPU,
    HARD,
    NETS,
    Boom,
    Call,
    Loose,
    Net,
    Routed,
    Shared,
    Spare,
    X,
    assert_same,
    noted,
    pipe_of,
    resident,
    results,
    size_of,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autofit.streaming import streaming
from autofit.trial.meter import asked_bytes

pytestmark = pytest.mark.usefixtures("without_gradients")


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
