"""Small modules whose weights stream, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from snapshots import snapshot
from torch import nn
from torch.nn import functional

from autofit.techniques.placement import Resident


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


CPU = torch.device("cpu")
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


CALLS: list[Call] = [{}] * 4 + [{"extra": True}] * 2 + [{}, {"extra": True}, {}]
