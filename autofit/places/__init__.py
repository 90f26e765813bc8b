"""The places that hold profiles, and the lookup through them in order."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autofit import store
from autofit.places import folders, remote
from autofit.places.entry import Entry, Question
from autofit.places.index import Index, used
from autofit.spec import BadInput, Profile

__all__ = ["Entry", "Item", "Place", "Question", "at", "find", "items", "places"]

PROJECT = ".autofit"
SHIPPED = Path(__file__).parent.parent / "profiles"


@dataclass(frozen=True)
class Place:
    """Where profiles lie: an absolute folder, or a URL that fsspec reads.

    ``name`` is what the place is to the user.
    """

    name: str
    url: str

    @property
    def folder(self) -> Path | None:
        """The folder, or None where it is behind a URL."""
        return None if "://" in self.url else Path(self.url)

    def location(self, name: str) -> str:
        """The path or URL of a file, without the password that a URL may hold."""
        folder = self.folder
        return f"{remote.shown(self.url)}/{name}" if folder is None else str(folder / name)

    def load(self, name: str, sha256: str | None = None) -> Profile:
        """Read a profile; one behind a URL through a copy in the user's folder.

        Raises:
            BadInput: it cannot be reached, is no profile, or has not this digest.
        """
        if self.folder is not None:
            return store.load(self.folder / name)
        path = remote.fetch(self.url, name, sha256)
        try:
            return store.load(path)
        except BadInput as error:
            raise BadInput(str(error).replace(str(path), self.location(name))) from error


@dataclass(frozen=True)
class Item:
    """A profile of a place, by what the index says of it."""

    place: Place
    name: str
    entry: Entry


def places() -> tuple[Place, ...]:
    """Where profiles are looked for, in this order.

    ``.autofit`` of the working folder or the nearest one above it; the user's folder; the folders
    and URLs of ``$AUTOFIT_PROFILES``, separated by spaces or commas; what autofit is shipped with.
    """
    user = store.folder().absolute() / "profiles"
    named = re.split(r"[\s,]+", os.environ.get("AUTOFIT_PROFILES", ""))
    return (
        *_projects()[:1],
        *([Place("user", str(user))] if user.is_dir() else []),
        *(at(url) for url in named if url),
        *([Place("shipped", str(SHIPPED))] if SHIPPED.is_dir() else []),
    )


def _projects() -> list[Place]:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # deleted while we are in it
        return []
    folders = (folder / PROJECT for folder in (here, *here.parents))
    return [Place("project", str(folder)) for folder in folders if folder.is_dir()]


def at(text: str) -> Place:
    """The place that a user names: a folder, or a URL as ``hf://datasets/user/profiles``."""
    if "://" in text.removeprefix("file://"):
        url = text.rstrip("/")
        return Place(remote.shown(url), url)
    path = str(Path(text.removeprefix("file://")).expanduser().absolute())
    return Place(path, path)


def find(question: Question, among: Sequence[Place] | None = None) -> Profile | None:
    """Look up the fastest profile that was measured for exactly this, on this.

    The first place that has one answers; those after it are not asked. A place that cannot be
    reached is passed over with a warning, as is a file that is not a profile.
    """
    faults: list[str] = []
    searched = places() if among is None else among
    found = used(lambda index: _find(index, question, searched, faults))
    for fault in dict.fromkeys(faults):
        warnings.warn(f"passed over: {fault}", stacklevel=2)
    return found


def _find(
    index: Index, question: Question, among: Iterable[Place], faults: list[str]
) -> Profile | None:
    for place in among:
        faults += _refresh(index, place)
        for row in index.answers(place.url, question.key):
            if not question.is_answered_by(row.entry):
                continue
            try:
                profile = place.load(row.name, row.sha256)
            except BadInput as error:
                faults.append(str(error))
                continue
            if question.is_answered_by(Entry.of(profile)):  # the index may be behind
                return profile
    return None


def items(among: Iterable[Place]) -> tuple[list[Item], list[str]]:
    """List all profiles of these places, and a line for each place or file passed over."""

    def listed(index: Index) -> tuple[list[Item], list[str]]:
        found, faults = [], []
        for place in among:
            faults += _refresh(index, place, thorough=True)
            found += [Item(place, row.name, row.entry) for row in index.rows(place.url)]
        return found, faults

    return used(listed)


def _refresh(index: Index, place: Place, thorough: bool = False) -> list[str]:
    """Bring the index up to date with a place, as far as it can be reached.

    Returns a line for each file that is no profile, or for why the place cannot be reached: what
    is known of it from before still counts.
    """
    try:
        if place.folder is not None:
            return folders.refresh(index, place.folder, thorough)
        remote.refresh(index, place.url)
    except BadInput as error:
        return [str(error)]
    except OSError as error:
        return [folders.unreadable(Path(place.url), error)]
    return []
