"""How much of the host this process, and those that it starts, may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import psutil

GROUPS = Path("/proc/self/cgroup")
MAPS = Path("/proc/self/maps")
NO_FILES = ("/dev/", "/memfd:", "/SYSV")
MOUNT = Path("/sys/fs/cgroup")
# In a container the groups' paths may be those of its host, and its own group is the mount's root.
ROOTS = ("0::/", "0:memory:/")
GRANT = "AUTOFIT_HOST_BYTES"  # of the environment, so that workers have it too
THREADS = "OMP_NUM_THREADS"  # that torch computes with on the CPU
PINNABLE_SHARE = 0.8  # page-locked memory cannot be reclaimed: something must be left that can


def limit_bytes() -> int:
    """The machine's memory, the limit of a cgroup or what is ``granted``: the lowest."""
    limits = [machine_bytes()]
    with suppress(KeyError, ValueError):
        limits.append(int(os.environ[GRANT]))
    return min(limits)


def machine_bytes(groups: Path = GROUPS, mount: Path = MOUNT) -> int:
    """The machine's memory, or the lowest limit of this process's cgroup and those around it."""
    return min([psutil.virtual_memory().total, *_limits_bytes(groups, mount)])


@contextmanager
def granted(size_bytes: int | None) -> Iterator[None]:
    """Inside, ``limit_bytes`` is at most this, here and in processes that are started here; None
    changes nothing."""
    with _set(GRANT, size_bytes):
        yield


@contextmanager
def shared(processes: int) -> Iterator[None]:
    """Processes that are started inside, so many, divide the cores: with a thread a core in each
    they wait for each other's (two that load SDXL at once, on two cores: 24 s, else 16 s). What the
    user has set is let be."""
    is_divided = processes > 1 and THREADS not in os.environ
    with _set(THREADS, max(1, _cores() // processes) if is_divided else None):
        yield


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _set(name: str, value: int | None) -> Iterator[None]:
    """A variable of the environment, inside; None changes nothing."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = str(value)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def pinnable_bytes(host_limit_bytes: int) -> int:
    """How much of it may be page-locked."""
    return int(PINNABLE_SHARE * host_limit_bytes)


def mapped_ranges(maps: Path = MAPS) -> list[tuple[int, int]]:
    """Where files lie in this process's memory, in order: (start, end) addresses. What was only
    read there may be forgotten, and is read again; not so what is shared memory by another name."""
    found = []
    with suppress(OSError):  # not Linux
        for line in maps.read_text().splitlines():
            span, _, _, _, _, *path = line.split(maxsplit=5)
            if path and path[0].startswith("/") and not path[0].startswith(NO_FILES):
                start, end = span.split("-")
                found.append((int(start, 16), int(end, 16)))
    return sorted(found)


def _limits_bytes(groups: Path, mount: Path) -> list[int]:
    lines = list(ROOTS)
    with suppress(OSError):  # not Linux
        lines += groups.read_text().splitlines()
    found = []
    for file in (file for line in lines for file in _files(line, mount)):
        with suppress(OSError, ValueError):  # no such group here, or "max"
            found.append(int(file.read_text()))
    return found


def _files(line: str, mount: Path) -> Iterator[Path]:
    """Where the limits of a group, and of all around it, are: ``0::/a/b`` of version 2 and
    ``4:memory:/a/b`` of version 1."""
    number, controllers, path = line.split(":", 2)
    if number == "0" and not controllers:
        roots, name = [mount, mount / "unified"], "memory.max"
    elif "memory" in controllers.split(","):
        roots, name = [mount / "memory"], "memory.limit_in_bytes"
    else:
        return
    group = PurePosixPath(path.lstrip("/"))
    inside = ".." not in group.parts  # else the group is not below this namespace's root
    for part in (group, *group.parents) if inside else ():
        yield from (root / part / name for root in roots)
