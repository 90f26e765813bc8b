"""The trials in tests/golden were recorded when tiles were cut otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_golden import GOLDEN

from autofit import tiling
from autofit.dryrun import memo

# How short a tile might be: on the H200 every one was as large as asked.
LEAST_PX = {"H200": 1 << 16, "H100": 448}


def each_as_recorded(folder: Path) -> Iterator[Path]:
    """The files of trials, one after the other, tiles being cut as they were then. Caches of dry
    runs are kept in ``folder``."""
    left = list(GOLDEN)
    for card, least_px in LEAST_PX.items():
        mine = [path for path in left if f"--{card}--" in path.name]
        left = [path for path in left if path not in mine]
        with _cut(least_px, folder / card):
            yield from mine
    assert not left, "a card whose tiles nobody knows"


@contextmanager
def _cut(least_px: int, folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "LEAST_PX", least_px)
        patch.setenv("AUTOFIT_HOME", str(folder))
        memo.forget()
        yield
    memo.forget()
