"""The H200's trials in tests/golden were recorded when every tile was as large as asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_golden import GOLDEN

from autofit import tiling
from autofit.dryrun import memo

AS_LARGE_AS_ASKED_PX = 1 << 16


def card_of(path: Path) -> str:
    return path.name.split("--")[1]


def each_as_recorded(folder: Path) -> Iterator[Path]:
    """The files of trials, one after the other, tiles being cut as they were then. Caches of dry
    runs are kept in ``folder``."""
    early = [path for path in GOLDEN if card_of(path) == "H200"]
    with _cut(AS_LARGE_AS_ASKED_PX, folder):
        yield from early
    yield from (path for path in GOLDEN if path not in early)


@contextmanager
def _cut(least_px: int, folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "LEAST_PX", least_px)
        patch.setenv("AUTOFIT_HOME", str(folder))
        memo.forget()
        yield
    memo.forget()
