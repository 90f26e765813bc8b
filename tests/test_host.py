"""How much host memory there is: the machine's, a cgroup's, or what is granted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit import host

MACHINE = psutil.virtual_memory().total
UNLIMITED = "9223372036854771712\n"  # version 1's word for it
SMALL, SMALLER = 2 * 10**6, 10**6  # bytes: below any machine's memory


def tree(folder: Path, lines: str, files: dict[str, str]) -> int:
    """The limit that is found where a process is in these groups, which have these files."""
    (folder / "cgroup").write_text(lines)
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return host.machine_bytes(folder / "cgroup", folder / "mount")


@pytest.mark.parametrize(
    ("lines", "files", "limit_bytes"),
    [
        ("", {}, MACHINE),
        ("0::/\n", {"memory.max": "max\n"}, MACHINE),
        ("0::/\n", {"memory.max": f"{SMALL}\n"}, SMALL),
        ("0::/a/b\n", {"a/b/memory.max": f"{SMALL}\n"}, SMALL),
        ("0::/a/b\n", {"a/memory.max": f"{SMALL}\n", "a/b/memory.max": "max\n"}, SMALL),
        ("0::/a/b\n", {"a/memory.max": f"{SMALLER}\n", "a/b/memory.max": f"{SMALL}\n"}, SMALLER),
        ("0::/a\n", {"other/memory.max": f"{SMALL}\n"}, MACHINE),
        ("4:memory:/a/b\n", {"memory/a/b/memory.limit_in_bytes": f"{SMALL}\n"}, SMALL),
        ("4:memory:/a/b\n", {"memory/a/memory.limit_in_bytes": f"{SMALL}\n"}, SMALL),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": UNLIMITED}, MACHINE),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": f"{SMALL}\n"}, SMALL),
        ("5:cpu:/a\n", {"memory/a/memory.limit_in_bytes": f"{SMALL}\n"}, MACHINE),
        ("4:memory:/a:b\n", {"memory/a:b/memory.limit_in_bytes": f"{SMALL}\n"}, SMALL),
        # both versions at once, version 2 beside version 1
        ("4:memory:/\n0::/a\n", {"unified/a/memory.max": f"{SMALL}\n"}, SMALL),
        (
            "4:memory:/a\n0::/a\n",
            {"a/memory.max": f"{SMALL}\n", "memory/a/memory.limit_in_bytes": f"{SMALLER}\n"},
            SMALLER,
        ),
        # in a container that has its host's paths, its own group is the mount's root
        ("4:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": f"{SMALL}\n"}, SMALL),
        # a group that is not below the namespace's root is not below the mount
        ("0::/../a\n", {"memory.max": f"{SMALL}\n", "a/memory.max": f"{SMALLER}\n"}, SMALL),
    ],
)
def test_the_lowest_limit_of_all_groups_around_the_process_counts(
    lines: str, files: dict[str, str], limit_bytes: int, tmp_path: Path
) -> None:
    assert tree(tmp_path, lines, files) == limit_bytes


def test_without_groups_it_is_the_machine_s(tmp_path: Path) -> None:
    assert host.machine_bytes(tmp_path / "none", tmp_path) == MACHINE


@given(st.lists(st.one_of(st.none(), st.integers(1, 10**9)), min_size=1, max_size=6))
def test_however_deep_the_lowest_counts(limits: list[int | None]) -> None:
    """One limit a level, the root's first."""
    with tempfile.TemporaryDirectory() as folder:
        files, group = {}, ""
        for depth, limit in enumerate(limits):
            group += f"g{depth}/" if depth else ""
            files[f"{group}memory.max"] = "max\n" if limit is None else f"{limit}\n"
        known = [limit for limit in limits if limit is not None]
        assert tree(Path(folder), f"0::/{group}\n", files) == min([MACHINE, *known])


def test_what_is_granted_bounds_the_limit_while_it_is() -> None:
    before = host.limit_bytes()
    with host.granted(SMALL):
        assert host.limit_bytes() == SMALL
        with host.granted(SMALLER):
            assert host.limit_bytes() == SMALLER
        with host.granted(None):
            assert host.limit_bytes() == SMALL
    assert host.limit_bytes() == before == host.machine_bytes()
    assert host.GRANT not in os.environ
    with host.granted(2 * MACHINE):
        assert host.limit_bytes() == before


def test_a_process_started_within_a_grant_has_it() -> None:
    asks = "from autofit import host; print(host.limit_bytes())"
    with host.granted(SMALL):
        told = subprocess.run([sys.executable, "-c", asks], capture_output=True, check=True)
    assert int(told.stdout) == SMALL


MAPS = """\
7f10-7f20 r--p 00000000 fe:01 1234 /models/a folder/unet.safetensors
7f00-7f08 rw-p 00000000 fe:01 1235 /models/vae.safetensors
7f30-7f40 rw-s 00000000 00:01 77   /memfd:weights (deleted)
7f50-7f60 rw-s 00000000 00:19 78   /dev/shm/torch_1
7f70-7f80 rw-p 00000000 00:00 0
7f90-7fa0 rw-p 00000000 00:00 0    [heap]
"""


def test_what_lies_in_files_is_told_from_other_memory(tmp_path: Path) -> None:
    """Also from shared memory, which has names as files have, and cannot be forgotten."""
    (tmp_path / "maps").write_text(MAPS)
    assert host.mapped_ranges(tmp_path / "maps") == [(0x7F00, 0x7F08), (0x7F10, 0x7F20)]
    assert host.mapped_ranges(tmp_path / "none") == []


def test_processes_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(host.THREADS, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    told = []
    for processes in (1, 2, 5, 32):
        with suppress(ValueError), host.shared(processes):
            told.append(os.environ.get(host.THREADS))
            raise ValueError
        assert host.THREADS not in os.environ
    assert told == [None, "8", "3", "1"]
    monkeypatch.setenv(host.THREADS, "4")
    with host.shared(2):
        assert os.environ[host.THREADS] == "4"  # the user's
    assert os.environ[host.THREADS] == "4"
