"""The index of all places: what their files say, so that a lookup reads none but the answer.

A cache in one SQLite file of the user's folder. The places' files are the truth: an index that is
missing, damaged or cannot be written to costs the time to read them again, and nothing else.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autofit import store
from autofit.places.entry import Entry, first_fault, from_json, to_json
from autofit.spec import BadInput, Profile

T = TypeVar("T")

FORMAT = 1  # of the tables; another number is another file
WAIT_S = 10.0  # for another process that writes, which takes milliseconds
TABLES = """
create table if not exists place(url text primary key, stamp text);
create table if not exists file(
    url text, name text, stamp text, sha256 text, asked text, image_s real, facts text,
    primary key (url, name)
) without rowid;
create index if not exists answers on file(url, asked, image_s);
pragma synchronous = off;
"""


@dataclass(frozen=True)
class Row:
    """One file of a place. ``stamp`` is another when the file may be another."""

    name: str
    stamp: str
    sha256: str
    facts: str  # its entry as JSON

    @property
    def entry(self) -> Entry:
        return from_json(self.facts)

    @classmethod
    def of(cls, profile: Profile, name: str, data: bytes, stamp: str | None = None) -> Row:
        """The row of a file that holds ``data``; without a stamp of its own that is its digest.

        Raises:
            BadInput: the profile says what no index takes.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            return cls(name, stamp or sha256, sha256, to_json(Entry.of(profile)))
        except ValueError as error:
            raise BadInput(f"profile {name}: {first_fault(error)}: plan anew") from error


class Index:
    """The rows of each place, by the place's URL or folder."""

    def __init__(self, tables: sqlite3.Connection) -> None:
        self._tables = tables

    def stamp(self, url: str) -> str | None:
        """What ``update`` was last told of a place as a whole; None where that says nothing."""
        found = self._tables.execute("select stamp from place where url = ?", (url,)).fetchone()
        return None if found is None else found[0]

    def stamps(self, url: str) -> dict[str, str]:
        """The stamp of each file, by its name."""
        return dict(self._tables.execute("select name, stamp from file where url = ?", (url,)))

    def update(
        self, url: str, new: Sequence[Row], gone: Iterable[str], stamp: str | None = None
    ) -> None:
        """Take in changed files and forget others, all or nothing."""
        facts = ((row, row.entry) for row in new)
        rows = [
            (url, row.name, row.stamp, row.sha256, entry.asked, entry.image_s, row.facts)
            for row, entry in facts
        ]
        with self._tables:
            self._tables.executemany(
                "delete from file where url = ? and name = ?", [(url, name) for name in gone]
            )
            self._tables.executemany("replace into file values (?, ?, ?, ?, ?, ?, ?)", rows)
            self._tables.execute("replace into place values (?, ?)", (url, stamp))

    def rows(self, url: str) -> list[Row]:
        """All files of a place, by name."""
        return self._select("where url = ? order by name", url)

    def answers(self, url: str, key: str) -> list[Row]:
        """The files that were measured for exactly this question, the fastest first."""
        return self._select("where url = ? and asked = ? order by image_s, name", url, key)

    def _select(self, condition: str, *values: str) -> list[Row]:
        query = f"select name, stamp, sha256, facts from file {condition}"
        return [Row(*columns) for columns in self._tables.execute(query, values)]


def used(action: Callable[[Index], T]) -> T:
    """Call ``action`` with the index of the user's folder, or with an empty one in memory where
    that is damaged (then it is made anew the next time) or cannot be written to."""
    path = store.folder() / f"places-{FORMAT}.sqlite"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _with_tables(path, action)
    except sqlite3.OperationalError:
        pass
    except sqlite3.DatabaseError:
        with suppress(OSError):
            path.unlink()
    return _with_tables(":memory:", action)


def _with_tables(path: Path | str, action: Callable[[Index], T]) -> T:
    with closing(sqlite3.connect(path, timeout=WAIT_S)) as tables:
        tables.executescript(TABLES)
        return action(Index(tables))
