"""A place that is a folder: its files found by a scan, and only changed ones read."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from autofit import store
from autofit.places.index import Index, Row
from autofit.spec import BadInput

AT_ONCE = 200  # files read between two writes to the index: what an interrupt loses
TICK_S, COARSE_TICK_S = 0.1, 3.0  # more than a file system's clock: of 10 ms; of whole seconds


def refresh(index: Index, folder: Path, thorough: bool = False) -> list[str]:
    """Bring the index up to date with a folder. Returns a line for each file that is no profile.

    Where no file came, went or was replaced since all were read, nothing is read: the folder's own
    time says so, without asking for that of 10,000 files (35 ms). What it does not say is that a
    file was written over in place: ``thorough`` finds that too.

    Raises:
        OSError: the folder cannot be listed.
    """
    url, now_ns = str(folder), time.time_ns()
    changed_ns = folder.stat().st_mtime_ns
    if not thorough and index.stamp(url) == str(changed_ns):
        return []
    known = index.stamps(url)  # before the scan: what another process adds meanwhile is not gone
    found = dict(_scan(folder))
    gone = known.keys() - found.keys()
    faults: list[str] = []
    for names in _batches(sorted(n for n, stamp in found.items() if known.get(n) != stamp)):
        rows, bad = _read(folder, {name: found[name] for name in names})
        index.update(url, rows, bad)
        faults += bad.values()
    stamp = str(changed_ns) if not faults and _is_settled(changed_ns, now_ns) else None
    if gone or stamp is not None:
        index.update(url, (), gone, stamp)
    return faults


def _is_settled(changed_ns: int, now_ns: int) -> bool:
    """Whether a change from now on is sure to change the folder's time: one within the same tick
    of the file system's clock would not."""
    tick_s = COARSE_TICK_S if changed_ns % 10**9 == 0 else TICK_S
    return now_ns - changed_ns > tick_s * 1e9


def _scan(folder: Path) -> Iterator[tuple[str, str]]:
    with os.scandir(folder) as files:
        for file in files:
            name = file.name
            # What is not printable may be bytes that are no text, which no index takes.
            if not name.endswith(".yaml") or name.startswith(".") or not name.isprintable():
                continue
            with suppress(FileNotFoundError):  # deleted since, or a link to nothing
                facts = file.stat()
                if stat.S_ISREG(facts.st_mode):
                    yield name, f"{facts.st_size}:{facts.st_mtime_ns}"


def _batches(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), AT_ONCE):
        yield names[start : start + AT_ONCE]


def _read(folder: Path, stamps: dict[str, str]) -> tuple[list[Row], dict[str, str]]:
    """The rows of these files, and the faults of those that have none, by name."""
    rows, faults = [], {}
    for name, stamp in stamps.items():
        try:
            profile = store.load(folder / name)
            rows.append(Row.of(profile, name, (folder / name).read_bytes(), stamp))
        except (BadInput, OSError) as error:
            faults[name] = str(error)
    return rows, faults


def names(folder: Path) -> list[str]:
    """The names of a folder's profiles, unread.

    Raises:
        BadInput: the folder cannot be listed.
    """
    try:
        return sorted(name for name, _ in _scan(folder))
    except OSError as error:
        raise BadInput(unreadable(folder, error)) from error


def unreadable(folder: Path, error: OSError) -> str:
    return f"place {folder}: cannot be read ({error.strerror or error}): check the path"
