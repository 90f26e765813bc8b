"""Profiles from one place to another, each read and checked on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from autofit import store, techniques
from autofit.files import write_whole
from autofit.places import Place, at, folders, remote
from autofit.places.entry import Entry
from autofit.places.index import Index, Row, used
from autofit.spec import BadInput, Profile

LOCK = ".index.lock"
WAIT_S = 60.0  # for other processes that write to the same folder


def push(path: Path, url: str) -> str:
    """Put a profile into a place, in place of one of the same plan for the same, and list it in
    the place's ``index.json``. Returns where it is.

    To a folder any number of processes push at once. Behind a URL there is no lock: of two
    pushes at the same moment one may miss the other's file in ``index.json``, which the next
    push finds.

    Raises:
        BadInput: not a profile, or a place that cannot be written to.
    """
    profile, place = store.load(path), at(url)
    name = store._file_name(profile)
    if place.folder is not None:
        _push_folder(profile, place.folder, name)
    else:
        _push_url(profile, place.url, name)
    return place.location(name)


def _push_folder(profile: Profile, folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store.save(profile, folder / name)
        with FileLock(folder / LOCK, timeout=WAIT_S):
            rows = used(lambda index: _all_rows(index, folder))
            write_whole(folder / remote.INDEX, remote.listing(str(folder), rows))
    except OSError as error:
        reason = f"cannot be written to ({error.strerror or error}): give another"
        raise BadInput(f"place {folder}: {reason}") from error


def _all_rows(index: Index, folder: Path) -> list[Row]:
    folders.refresh(index, folder)
    return index.rows(str(folder))


def _push_url(profile: Profile, url: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        store.save(profile, path)
        data = path.read_bytes()
    row = Row.of(profile, name, data)
    remote.write(url, name, data)
    there = remote.names(url)
    known = {row.name: row for row in remote.rows(url)} if remote.INDEX in there else {}
    known[name] = row
    rows = (known.get(n) or _read_row(url, n) for n in sorted(there) if remote.is_name(n))
    remote.write(url, remote.INDEX, remote.listing(url, filter(None, rows)))


def _read_row(url: str, name: str) -> Row | None:
    """The row of a file that is not listed yet; None where it cannot be read as a profile."""
    try:
        path = remote.fetch(url, name)
        return Row.of(store.load(path), name, path.read_bytes())
    except BadInput:
        return None


# ---------------------------------------------------------------- reading all of it


@dataclass(frozen=True)
class Checked:
    """One file of a place: the profile that it is, or the line that says why it is none."""

    location: str
    profile: Profile | None
    fault: str = ""


def check(place: Place, name: str | None = None) -> Iterator[Checked]:
    """Read every file of a place anew, or one of them.

    Raises:
        BadInput: the place cannot be reached, or ``name`` cannot be a profile's.
    """
    if name is not None and place.folder is None and not remote.is_name(name):
        raise BadInput(f"name {name!r}: not a file name of a profile; write NAME.yaml")
    if place.folder is not None:
        for each in folders.names(place.folder) if name is None else [name]:
            yield _checked(place, each)
    elif name is not None:
        yield _checked(place, name)
    else:
        for row in remote.rows(place.url):
            yield _checked(place, row.name, row)


def check_all(places: Iterable[Place]) -> Iterator[Checked]:
    """Read every file of these places anew; a place that cannot be reached is a fault too."""
    for place in places:
        try:
            yield from check(place)
        except BadInput as error:
            yield Checked(place.name, None, str(error))


def _checked(place: Place, name: str, row: Row | None = None) -> Checked:
    location = place.location(name)
    try:
        profile = place.load(name, row.sha256 if row else None)
    except BadInput as error:
        return Checked(location, None, str(error))
    reason = techniques.clash(profile.plan.techniques)
    if reason is not None:
        return Checked(location, None, f"profile {location}: plan: {reason}")
    if row is not None and row.entry != Entry.of(profile):
        return Checked(location, None, f"profile {location}: {remote.INDEX} says otherwise of it")
    return Checked(location, profile)


def pull(place: Place, name: str | None = None) -> Iterator[Checked]:
    """Copy a place's profiles, or one of them, into the user's folder.

    A profile that the user has already, of the same plan for the same, stays as it is. Yields what
    was read, with the path in the user's folder as the location of what is there now.

    Raises:
        BadInput: the place cannot be reached, or the folder cannot be written to.
    """
    for read in check(place, name):
        if read.profile is None:
            yield read
            continue
        own = store.folder() / "profiles" / store._file_name(read.profile)
        path = own if own.exists() else store.keep(read.profile)
        yield Checked(str(path), read.profile)
