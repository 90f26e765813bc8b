"""Compiled blocks whose weights stream layer by layer: the resident block's results."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import peft
import pytest
import torch
from snapshots import differences
from streaming_nets import Boom, noted, size_of
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

from autofit.streaming import doors, engine, streaming
from autofit.streaming.parts import Part, parts
from autofit.techniques.execution import RegionalCompile
from autofit.techniques.placement import Resident

pytestmark = [
    pytest.mark.usefixtures("without_gradients"),
    pytest.mark.timeout(600),
]
WIDTH = 64
UNIT_BYTES = 40_000  # about two of a block's layers
X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two streams, so that much may run in another order than the program's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.other_up = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128)
        self.down, self.other_down = nn.Linear(128, WIDTH), nn.Linear(128, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.first(self.norm(x)), self.second(y)
        up, other_up = self.up(first * second), self.other_up(self.norm(y))
        return x + self.down(functional.gelu(up)), y + self.other_down(functional.gelu(other_up))


class Denoiser(nn.Module):
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = self.before(x), x
        for block in self.blocks:
            x, y = block(x, y)
        return self.after(x + y)


@pytest.fixture
def pipe() -> Any:
    net = Denoiser().eval()
    return SimpleNamespace(components={"unet": net}, unet=net)


@pytest.fixture
def to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile to Python: what a block runs is recorded, and run from there."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """The parts of the pipe that streams."""
    found: list[Part] = []
    monkeypatch.setattr(engine, "parts", lambda *asked: found.extend(parts(*asked)) or found)
    return found


def resident(pipe: Any, device: str = "cpu", calls: int = 2) -> tuple[torch.Tensor, int]:
    """What compiled blocks give, and how many graphs were compiled."""
    counters.clear()
    with RegionalCompile().applied(pipe, device), Resident().applied(pipe, device):
        found = [pipe.unet(X.to(device)) for _ in range(calls)]
    return found[-1], counters["stats"]["unique_graphs"]


@contextmanager
def streamed(pipe: Any, device: str = "cpu", size_bytes: int | None = None) -> Iterator[None]:
    counters.clear()
    streams = streaming(pipe, torch.device(device), size_bytes, unit_bytes=UNIT_BYTES)
    with RegionalCompile().applied(pipe, device), streams:
        yield


def assert_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """On CUDA a bias is added where the matrix product is made, and not after it."""
    if found.is_cuda:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(found, wanted)


def check(pipe: Any, device: str, seen: list[Part], copies: list[int]) -> None:
    wanted, graphs = resident(pipe, device)
    before = noted(pipe, device)
    called: list[nn.Module] = []

    def note(door: Any, _: Any) -> None:
        called.append(door.layer)

    with streamed(pipe, device):
        for layer in (m for block in pipe.unet.blocks for m in doors.layers(block)):
            doors.entrance(layer).register_forward_pre_hook(note)
        pipe.unet(X.to(device))  # recorded, and not compiled
        for _ in range(5):
            copies.clear()
            called.clear()
            assert_alike(pipe.unet(X.to(device)), wanted)
        part = seen[0]
        assert part.times_s is not None
        layers = [m for u in part.division.order for m in u.modules]
        moved_bytes = sum(unit.size_bytes for unit in part.streamed)
        largest_bytes = max(unit.size_bytes for unit in part.division.order)
    assert called == layers[1:-1]  # in the order recorded
    assert len(layers) == 2 + 3 * 6
    assert sum(copies) <= moved_bytes  # each once: none was sought
    assert sum(copies) > size_of(pipe.unet) / 2
    assert largest_bytes <= max(UNIT_BYTES, 128 * WIDTH * 4 + 1024) < size_of(pipe.unet.blocks[0])
    assert counters["stats"]["unique_graphs"] == graphs == 1
    assert differences(before, noted(pipe, device)) == []


@pytest.mark.slow
def test_compiled_blocks_stream_layer_by_layer(
    pipe: Any, device: str, seen: list[Part], copies: list[int]
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    check(pipe, device, seen, copies)


def test_whatever_compiles_them(
    pipe: Any, device: str, seen: list[Part], copies: list[int], to_python: None
) -> None:
    check(pipe, device, seen, copies)


@pytest.mark.parametrize("share", [0.4, 0.8, 2.0])
def test_at_every_residency(share: float, pipe: Any, device: str, to_python: None) -> None:
    wanted, _ = resident(pipe, device)
    with streamed(pipe, device, int(share * size_of(pipe.unet))):
        for _ in range(6):
            assert_alike(pipe.unet(X.to(device)), wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_an_error_in_the_middle_of_a_block(pipe: Any, to_python: None) -> None:
    wanted, _ = resident(pipe)
    before, errors = noted(pipe, "cpu"), list[type[Exception]]()

    def fails(*_: Any) -> None:
        if errors:
            raise errors.pop()

    def failing() -> None:
        errors.append(Boom)
        with pytest.raises(Boom):
            pipe.unet(X)

    with streamed(pipe):
        doors.entrance(pipe.unet.blocks[1].up).register_forward_pre_hook(fails)
        for _ in range(6):
            assert torch.equal(pipe.unet(X), wanted)
            failing()
    assert differences(before, noted(pipe, "cpu")) == []
    assert doors._DOORS == {}
    assert torch.equal(resident(pipe)[0], wanted)


class Subclass(nn.Linear):
    pass


def tied(net: Denoiser) -> None:
    for block in net.blocks:
        block.up.weight = block.other_up.weight


def subclassed(net: Denoiser) -> None:
    for block in net.blocks:
        block.up = Subclass(WIDTH, 128)


def hooked(net: Denoiser) -> None:
    for block in net.blocks:
        block.second.register_forward_hook(lambda layer, _, out: out @ layer.weight)


@pytest.mark.parametrize("change", [tied, subclassed, hooked])
def test_blocks_that_are_entered_as_a_whole(
    change: Callable[[Denoiser], None], pipe: Any, seen: list[Part], to_python: None
) -> None:
    change(pipe.unet)
    wanted, graphs = resident(pipe)
    with streamed(pipe):
        for _ in range(5):
            assert torch.equal(pipe.unet(X), wanted)
        assert not any(map(doors.layers, pipe.unet.blocks))
        modules = [m for u in seen[0].division.order for m in u.modules]
    assert set(pipe.unet.blocks) < set(modules)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_that_compile_layers_too(mode: str, pipe: Any) -> None:
    streams = streaming(pipe, torch.device("cpu"), None, unit_bytes=UNIT_BYTES)
    with RegionalCompile(mode).applied(pipe, "cpu"), streams:
        assert not any(map(doors.layers, pipe.unet.blocks))


def test_small_blocks_are_units_of_their_own(pipe: Any) -> None:
    streams = streaming(pipe, torch.device("cpu"), None, unit_bytes=size_of(pipe.unet.blocks[0]))
    with RegionalCompile().applied(pipe, "cpu"), streams:
        assert not any(map(doors.layers, pipe.unet.blocks))


def test_layers_with_a_lora(pipe: Any, seen: list[Part], to_python: None) -> None:
    config = peft.LoraConfig(r=2, target_modules=["first", "up"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.unet)
    wanted, graphs = resident(pipe)
    with streamed(pipe):
        for _ in range(5):
            assert torch.equal(pipe.unet(X), wanted)
        assert pipe.unet.blocks[0].up.base_layer in doors.layers(pipe.unet.blocks[0])
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("casts", [False, True])
def test_gradients_and_casts_run_eagerly(casts: bool, pipe: Any, to_python: None) -> None:
    cast = torch.autocast("cpu", torch.bfloat16) if casts else nullcontext()
    with torch.set_grad_enabled(not casts), cast:
        wanted = pipe.unet(X)
    with streamed(pipe):
        for _ in range(3):
            pipe.unet(X)
        with torch.set_grad_enabled(not casts), cast:
            assert RegionalCompile().fallbacks(pipe) == ()
            found = pipe.unet(X)
        (told,) = RegionalCompile().fallbacks(pipe)
    assert told.startswith("Denoiser runs eagerly, not compiled: its call ")
    assert torch.equal(found, wanted)
    assert found.requires_grad is not casts
    assert counters["stats"]["unique_graphs"] == 1
