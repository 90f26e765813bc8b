"""Weights of the denoiser in memory that the VAE works in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
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

from autofit import anatomy, techniques
from autofit.spec import BadInput, Plan
from autofit.streaming.loan import Loan
from autofit.techniques.cuda_graph import CudaGraph
from autofit.techniques.streamed import Streamed
from autofit.trial.meter import tracked

__all__ = ["plain"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS = 4


@pytest.fixture
def loans(monkeypatch: pytest.MonkeyPatch) -> list[Loan]:
    """All loans made. What is given back is written over first, as a decode would."""
    made: list[Loan] = []
    start, give_back = Loan.__init__, Loan.give_back

    def started(self: Loan, *args: Any) -> None:
        start(self, *args)
        made.append(self)

    def spoilt(self: Loan) -> None:
        self.take().fill_(255)
        give_back(self)

    monkeypatch.setattr(Loan, "__init__", started)
    monkeypatch.setattr(Loan, "give_back", spoilt)
    return made


def borrowing(pipe: Any, share: float, borrowed: float | None) -> Streamed:
    """Shares of the bytes of all weights that an image needs."""
    weights_bytes = int(share * run_bytes(pipe)) + settled_bytes(pipe)
    borrowed_bytes = None if borrowed is None else int(borrowed * run_bytes(pipe))
    return Streamed(weights_bytes, UNIT_BYTES, borrows=True, borrowed_bytes=borrowed_bytes)


@contextmanager
def applied(pipe: Any, device: str, *found: Any) -> Iterator[None]:
    with techniques.applied(Plan(found), pipe, device):
        yield


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("borrowed", [None, 0.2, 2.0])
def test_images_are_the_resident_pipes(
    share: float,
    borrowed: float | None,
    model: str,
    pipes: Pipes,
    device: str,
    plain: Any,
    loans: list[Loan],
) -> None:
    pipe = pipes[model]
    wanted, before = plain(model, device), noted(pipe, device)
    with applied(pipe, device, borrowing(pipe, share, borrowed)):
        for _ in range(3):
            assert_alike(images(pipe), wanted, device)
        assert len(loans) == 1
    assert differences(before, noted(pipe, device)) == []


def moved_bytes(pipe: Any, device: str, copies: list[int], streamed: Streamed) -> int:
    """In an image, once all is arranged."""
    with applied(pipe, device, streamed):
        for _ in range(3):
            copies.clear()
            images(pipe, steps=STEPS)
    return sum(copies)


def test_what_is_borrowed_comes_once_an_image_and_not_every_step(
    pipes: Pipes, device: str, copies: list[int]
) -> None:
    pipe = pipes["tiny-sd"]
    borrows = borrowing(pipe, 0.4, 0.2)
    without = Streamed(borrows.weights_bytes, UNIT_BYTES)
    assert borrows.borrowed_bytes is not None
    saved = moved_bytes(pipe, device, copies, without) - moved_bytes(pipe, device, copies, borrows)
    # less a unit that may not fill it; the largest is a fifth
    assert saved > 0.6 * (STEPS - 1) * borrows.borrowed_bytes


@pytest.mark.parametrize("share", [0.9, 2.0])
def test_no_more_is_borrowed_than_its_own_memory_does_not_hold(
    share: float, pipes: Pipes, device: str, copies: list[int]
) -> None:
    pipe = pipes["tiny-sd"]
    borrows = borrowing(pipe, share, 0.8)
    without = Streamed(borrows.weights_bytes, UNIT_BYTES)
    most = moved_bytes(pipe, device, copies, without)
    assert moved_bytes(pipe, device, copies, borrows) <= most
    assert (most == 0) == (share == 2.0)


def test_the_decode_has_the_memory(pipes: Pipes, device: str, loans: list[Loan]) -> None:
    pipe = pipes["tiny-sd"]
    taken: dict[str, list[bool]] = {"unet": [], "vae": []}

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: taken[name].append(loans[0].is_taken)

    watched = {"unet": pipe.unet.conv_in, "vae": anatomy.vae(pipe).decoder.conv_in}
    handles = [m.register_forward_pre_hook(noting(n)) for n, m in watched.items()]
    with applied(pipe, device, borrowing(pipe, 0.4, 0.2)):
        images(pipe, steps=STEPS)
        images(pipe, steps=STEPS)
        assert not loans[0].is_taken
    for handle in handles:
        handle.remove()
    assert taken["unet"][1:] == [n % STEPS > 0 or n > 0 for n in range(1, 2 * STEPS)]
    assert taken["vae"] == [False, False]


def test_peaks_differ_by_no_more_than_what_is_borrowed(pipes: Pipes) -> None:
    """And where the decode is the peak, not at all."""
    pipe = pipes["tiny-sd"]
    peaks = []
    for borrows in (False, True):
        found = borrowing(pipe, 0.4, 0.02)
        streamed = found if borrows else Streamed(found.weights_bytes, UNIT_BYTES)
        with tracked(pipe, torch.device("cpu"), None) as tracker, applied(pipe, "cpu", streamed):
            images(pipe, 128, 128)
            tracker.peak_bytes = 0
            images(pipe, 128, 128)
            peaks.append(tracker.peak_bytes)
    assert peaks[0] == peaks[1]


def test_a_module_of_the_denoiser_that_is_called_by_itself_has_its_weights(
    pipes: Pipes, device: str, loans: list[Loan]
) -> None:
    pipe = pipes["tiny-sd"]
    layer = pipe.unet.up_blocks[-1].resnets[-1].conv1
    given = torch.ones(1, layer.in_channels, 8, 8, device=device)
    wanted = torch.nn.functional.conv2d(
        given, layer.weight.to(device), layer.bias.to(device), padding=layer.padding
    )
    with applied(pipe, device, borrowing(pipe, 0.5, 2.0)):
        images(pipe)
        assert layer.weight.device.type == "cpu"  # in the loan else, which the decode has
        torch.testing.assert_close(layer(given), wanted)
        assert loans[0].is_taken


@pytest.mark.parametrize("where", ["unet", "decoder"])
def test_after_an_error_it_goes_on(
    where: str, pipes: Pipes, device: str, plain: Any, loans: list[Loan]
) -> None:
    pipe = pipes["tiny-sd"]
    wanted = plain("tiny-sd", device)
    broken = pipe.unet.up_blocks[0] if where == "unet" else anatomy.vae(pipe).decoder.mid_block
    with applied(pipe, device, borrowing(pipe, 0.5, 0.2)):
        for _ in range(2):
            handle = broken.register_forward_pre_hook(_fail)
            with pytest.raises(ZeroDivisionError):
                images(pipe)
            handle.remove()
            assert_alike(images(pipe), wanted, device)


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


def test_where_the_memory_is_missing_the_next_call_tries_again(
    pipes: Pipes, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, wanted, take = pipes["tiny-sd"], plain("tiny-sd", "cpu"), Loan.take

    def none(_: Loan) -> torch.Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 1 bytes")

    with applied(pipe, "cpu", borrowing(pipe, 0.5, 0.2)):
        images(pipe)
        monkeypatch.setattr(Loan, "take", none)
        with pytest.raises(torch.OutOfMemoryError):
            images(pipe)
        monkeypatch.setattr(Loan, "take", take)
        assert np.array_equal(images(pipe), wanted)


def test_bytes_are_borrowed_by_who_borrows() -> None:
    with pytest.raises(BadInput, match="borrowed_bytes=5 without borrows"):
        Streamed(10, borrowed_bytes=5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl", "tiny-flux"])
def test_graphs_find_the_weights_where_they_were(
    name: str, pipes: Pipes, plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipes[name]
    wanted, made = plain(name, "cuda:0"), list[int]()
    capture = torch.cuda.CUDAGraph.capture_end

    def counted(self: torch.cuda.CUDAGraph) -> None:
        made.append(1)
        capture(self)

    with (
        pytest.MonkeyPatch.context() as patch,
        caplog.at_level(logging.WARNING, "autofit"),
        applied(pipe, "cuda:0", CudaGraph(), borrowing(pipe, 0.4, 0.3)),
    ):
        patch.setattr(torch.cuda.CUDAGraph, "capture_end", counted)
        for _ in range(5):
            assert_alike(images(pipe), wanted, "cuda:0")
    assert len(made) == 2  # the first is timed
    assert not caplog.records


@pytest.mark.gpu
def test_the_decode_works_in_the_loan(pipes: Pipes) -> None:
    """On the device reserved memory is what counts: that of a loan large enough for the decode is
    the only memory which the decode takes."""
    pipe = pipes["tiny-sd"]
    pipe.vae.to("cpu")
    with applied(pipe, "cuda:0", borrowing(pipe, 0.5, None)):
        images(pipe, 512, 512)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(3):
            images(pipe, 512, 512)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before
    torch.cuda.empty_cache()
