"""An interrupt at any line of the streaming code leaves a pipe that can be used."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshots import differences, snapshot
from streaming_lanes import watched
from streaming_nets import CPU, Routed, X, assert_same, results
from torch import nn

from autofit.streaming import engine, streaming

pytestmark = pytest.mark.usefixtures("without_gradients")

FOLDER = str(Path(engine.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the streaming code.

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
