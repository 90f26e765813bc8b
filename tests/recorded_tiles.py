"""The H200's trials in tests/golden were recorded when every tile was as large as asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from test_golden import GOLDEN

from autofit import tiling
from autofit.dryrun import memo

AS_LARGE_AS_ASKED_PX = 1 << 16


def each_as_recorded(card: str, folder: Path) -> Iterator[Path]:
    """The files of a card's trials, one after the other, tiles being cut as they were then. Of
    others than today's, caches of dry runs are kept in ``folder``."""
    with _cut(AS_LARGE_AS_ASKED_PX, folder) if card == "H200" else nullcontext():
        yield from (path for path in GOLDEN if path.name.split("--")[1] == card)


@contextmanager
def _cut(least_px: int, folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "LEAST_PX", least_px)
        patch.setenv("AUTOFIT_HOME", str(folder))
        memo.forget()
        yield
    memo.forget()
