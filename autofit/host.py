"""How much host memory this process may use."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
PINNABLE_SHARE = 0.8  # page-locked memory cannot be reclaimed: something must be left that can


def limit_bytes() -> int:
    """The machine's memory, or the cgroup's limit where lower."""
    limits = [psutil.virtual_memory().total]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such cgroup version, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def pinnable_bytes(host_limit_bytes: int) -> int:
    """How much of it may be page-locked."""
    return int(PINNABLE_SHARE * host_limit_bytes)
