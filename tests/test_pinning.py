"""Page-locking memory that exists."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import nn

from autofit import host, pinning
from autofit.pinning import SMALLEST_BYTES, host_registered


class _Runtime:
    """Stands for the CUDA runtime: refuses what it is told to."""

    def __init__(self) -> None:
        self.refused: int | None = None
        self.locked: dict[int, int] = {}
        self.asked = 0

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        if pointer == self.refused:
            return 801
        assert pointer not in self.locked
        self.asked += 1
        self.locked[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> _Runtime:
    found = _Runtime()
    monkeypatch.setattr(pinning, "_runtime", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return found


def _weights() -> nn.ModuleDict:
    """Two large weights, one of them in two layers, and a small one."""
    first, second, tied = (nn.Linear(1024, 512, bias=False) for _ in range(3))
    tied.weight = nn.Parameter(first.weight.data)
    return nn.ModuleDict({"a": first, "b": second, "c": tied, "small": nn.Linear(8, 8)})


def test_large_storages_are_registered_once_and_released(runtime: _Runtime) -> None:
    modules = _weights()
    with host_registered([modules], "cpu"):
        pointers = {modules[n].weight.data_ptr() for n in "ab"}
        assert set(runtime.locked) == pointers
        assert all(size == 2 * SMALLEST_BYTES for size in runtime.locked.values())
    assert runtime.locked == {}


def test_what_the_host_has_no_room_for_is_left(
    runtime: _Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = _weights()
    monkeypatch.setattr(host, "limit_bytes", lambda: 4 * SMALLEST_BYTES)
    with host_registered([modules["b"], modules], "cpu"):
        assert set(runtime.locked) == {modules["b"].weight.data_ptr()}
    assert runtime.locked == {}


def test_what_another_pipe_has_locked_counts(
    runtime: _Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _weights()["a"], _weights()["b"]
    monkeypatch.setattr(host, "limit_bytes", lambda: 4 * SMALLEST_BYTES)  # room for one
    with host_registered([first], "cpu"), host_registered([second], "cpu"):
        assert set(runtime.locked) == {first.weight.data_ptr()}
    with host_registered([second], "cpu"):
        assert set(runtime.locked) == {second.weight.data_ptr()}


def test_a_storage_that_is_refused_is_left(runtime: _Runtime) -> None:
    modules = _weights()
    runtime.refused = modules["a"].weight.data_ptr()
    with host_registered([modules], "cpu"):
        assert set(runtime.locked) == {modules["b"].weight.data_ptr()}
    assert runtime.locked == {}


def test_what_is_kept_is_registered_once(
    runtime: _Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = _weights()
    pointers = {name: modules[name].weight.data_ptr() for name in "ab"}
    with pinning.kept():
        for _ in range(3):
            with host_registered([modules], "cpu"):
                assert set(runtime.locked) == {*pointers.values()}
            assert set(runtime.locked) == {*pointers.values()}
        assert runtime.asked == 2
        with host_registered([modules["a"]], "cpu"):
            assert set(runtime.locked) == {pointers["a"]}
        monkeypatch.setattr(host, "limit_bytes", lambda: 4 * SMALLEST_BYTES)
        with host_registered([modules["a"], modules["b"]], "cpu"):  # there is room for one
            assert set(runtime.locked) == {pointers["a"]}
    assert runtime.locked == {}
    with host_registered([modules["a"]], "cpu"):
        pass
    assert runtime.locked == {}


def test_what_is_kept_is_held_until_it_is_let_go(runtime: _Runtime) -> None:
    """Memory that is freed while it is page-locked may be given to somebody else."""
    module = nn.Linear(1024, 512, bias=False)
    found = module.weight.data
    with pinning.kept():
        module.weight.data = found.double()
        with host_registered([module], "cpu"):
            (cast,) = runtime.locked
        module.weight.data = found
        others = [torch.empty(1024 * 512, dtype=torch.float64) for _ in range(8)]
        assert cast not in {t.data_ptr() for t in others}
        assert set(runtime.locked) == {cast}
        pinning.let_go(but=[module])
        assert runtime.locked == {}
        with host_registered([module], "cpu"):
            pass
        pinning.let_go(but=[module])
        assert set(runtime.locked) == {found.data_ptr()}


@pytest.mark.gpu
def test_registered_memory_is_pinned_in_place() -> None:
    modules = _weights()
    weight = modules["a"].weight
    with host_registered([modules], "cuda:0"):
        assert weight.is_pinned()
        assert weight.data.pin_memory().data_ptr() == weight.data_ptr()
        assert not modules["small"].weight.is_pinned()
    assert not weight.is_pinned()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_memory_that_cuda_refuses_does_not_spoil_what_follows(tmp_path: Any) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * SMALLEST_BYTES))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    module = nn.Linear(1024, 1024, bias=False)
    module.weight.data = torch.frombuffer(mapped, dtype=torch.float32).view(1024, 1024)
    with host_registered([module], "cuda:0"):
        assert float(module.weight.data.to("cuda:0").sum()) == 0.0
