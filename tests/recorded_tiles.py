"""The trials in tests/golden were recorded when tiles were cut otherwise, and by a probe that did
not measure what the host needs for a launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from test_golden import GOLDEN

from autofit import tiling
from autofit.dryrun import memo
from autofit.spec import LAUNCH_S, Device

# How short a tile might be: on the H200 every one was as large as asked.
LEAST_PX = {"H200": 1 << 16, "H100": 448}
# ``Device.launch_s`` of their hosts. On the H100's SD 1.5, resident in bfloat16 at 512x512, took
# 0.0283 s a step for what counts as 513 operations (55 us; its trial is here), and SDXL, all
# resident, 0.0659 s for 1,276 (52 us; another day, scripts/bench_peers.py).
LAUNCHES_S = {"H200": LAUNCH_S, "H100": 5.3e-5}


def card_of(path: Path) -> str:
    return path.name.split("--")[1]


def hosted(device: Device, path: Path) -> Device:
    """The device of a file of trials, with what its host needed."""
    return replace(device, launch_s=LAUNCHES_S[card_of(path)])


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
