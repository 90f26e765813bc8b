"""Small weights side by side in host memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autofit.streaming import pack as packing
from autofit.streaming.pack import PACKED_BYTES, pack, runs
from autofit.streaming.schedule import aligned

SLAB_BYTES = 4 * 2**20


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SLAB_BYTES", SLAB_BYTES)
    monkeypatch.setattr(packing, "PACKED_BYTES", SLAB_BYTES)


def weights() -> list[nn.Parameter]:
    """Ten MiB and some: of odd sizes, two dtypes and two memory formats, and one that is large."""
    torch.manual_seed(0)
    shapes = [(300, 1000), (64, 32, 3, 3), (700, 1000), (7,), (400, 1001), (900, 1000), (5, 3)]
    found = [torch.randn(shape) for shape in shapes]
    found[1] = found[1].to(memory_format=torch.channels_last)
    found[3] = found[3].bfloat16()
    return [nn.Parameter(t) for t in (*found, torch.randn(1500, 1000))]


def places(parameters: list[nn.Parameter]) -> list[int]:
    return [p.data_ptr() for p in parameters]


def joined(parameters: list[nn.Parameter]) -> int:
    """How many copies they take."""
    flat = [p.data.as_strided((p.numel(),), (1,)).view(torch.uint8) for p in parameters]
    return len(runs(flat, [aligned(p.nbytes) for p in parameters]))


def test_the_same_weights_in_fewer_copies() -> None:
    parameters, expected = weights(), weights()
    large = parameters[-1].data_ptr()
    pack(parameters)
    assert joined(expected) == len(expected)
    assert joined(parameters) == 4  # three slabs, and the one that is large
    assert parameters[-1].data_ptr() == large
    for got, want in zip(parameters, expected, strict=True):
        assert torch.equal(got, want)
        assert (got.dtype, got.stride()) == (want.dtype, want.stride())


def test_what_is_packed_is_not_copied_again() -> None:
    parameters = weights()
    pack(parameters)
    before = places(parameters)
    pack(parameters)
    assert places(parameters) == before


def test_of_what_changed_since_only_its_slab_is_packed_anew() -> None:
    """As where a plan lays the convolutions out otherwise: the memory found is for the undo."""
    parameters, expected = weights(), weights()
    pack(parameters)
    before, found = places(parameters), [p.data for p in parameters]
    parameters[1].data = parameters[1].data.contiguous() * 2
    pack(parameters)
    moved = [now != then for now, then in zip(places(parameters), before, strict=True)]
    assert moved == [*[True] * 4, *[False] * 4]
    assert joined(parameters) == 4
    assert torch.equal(parameters[1], 2 * expected[1])
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("change", ["fewer", "reversed"])
def test_another_order_is_packed_anew(change: str) -> None:
    parameters = weights()[:3]
    expected = [p.detach().clone() for p in parameters]
    pack(parameters)
    before = places(parameters)
    others = parameters[1:] if change == "fewer" else parameters[::-1]
    pack(others)
    assert all(p.data_ptr() not in before for p in others)
    assert joined(others) == 1
    for got, want in zip(parameters, expected, strict=True):
        assert torch.equal(got, want)


def test_a_file_that_is_mapped_as_a_whole_is_no_slab() -> None:
    """Its weights lie side by side as well, in memory that cannot be page-locked."""
    file = torch.zeros(PACKED_BYTES // 4)
    parameters = [nn.Parameter(file[at : at + 2**18]) for at in (0, 2**18)]
    pack(parameters)
    assert joined(parameters) == 1
    assert all(p.untyped_storage().nbytes() == 2 * 2**20 for p in parameters)
