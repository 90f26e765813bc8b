"""Where Optuna keeps a study: a database by URL, a journal by its path, else one of the user's."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from autofit import store
from autofit.spec import AutofitError, BadInput
from autofit.trial.reference import Reference

TRIES, WAIT_S = 4, 0.5  # to open a database whose tables others are making
# A line takes milliseconds to write: whoever holds a journal's lock for longer was killed.
GRACE_S = 5
JOURNALS = (".journal", ".log")  # endings of a path that is no URL
HEAD = b'{"op_code":'  # of a journal's lines
EXAMPLES = "write as sqlite:///studies.db, postgresql://user@host/name or studies.journal"
# By database: its driver, whichever SQLAlchemy would choose, and our extra that has it.
DRIVERS = {"postgresql": ("psycopg2", "postgres"), "mysql": ("pymysql", "mysql")}


def storage(url: str | None, name: str, *, fresh: bool = False) -> Any:
    """Open the storage for a study. With ``fresh``, what it holds of the study is forgotten.

    Raises:
        BadInput: a URL that opens nothing, a folder that cannot be written, a damaged journal.
    """
    if url is not None:
        shared = opened(url)
        if fresh:
            with suppress(KeyError):  # there is no such study yet
                optuna.delete_study(study_name=name, storage=shared)
        return shared
    path = store.folder() / "studies" / f"{name}.journal"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh and path.exists():
            os.replace(path, path.with_suffix(".old"))
        return _journal(path, "start anew with --fresh")
    except OSError as error:
        raise _unwritable(path, error) from error


def opened(url: str) -> Any:
    """Open a storage that studies share: a database, or a journal by its path or as
    journal:///path.

    Raises:
        BadInput: it opens nothing. A password in it is not repeated.
    """
    path = url.removeprefix("journal://")
    if "://" in path or (path == url and not path.endswith(JOURNALS)):
        return _database(url)
    try:
        return _journal(Path(path), "give another file")
    except OSError as error:
        raise BadInput(f"storage {url!r}: {error.strerror or error}; {EXAMPLES}") from error


def image(name: str, *, fresh: bool = False) -> Path:
    """Where a study keeps the image that its trials are compared with. With ``fresh``, the one that
    is there is forgotten; so is one that is damaged, with a warning: the study makes it anew.

    Raises:
        BadInput: a folder that cannot be written.
    """
    path = store.folder() / "studies" / f"{name}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh or _is_damaged(path):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> BadInput:
    reason = error.strerror or error
    return BadInput(f"study {path}: {reason}; set AUTOFIT_HOME to another folder")


def _is_damaged(image: Path) -> bool:
    try:
        Reference.load(image)
    except AutofitError as error:
        warnings.warn(f"made anew: {error}", stacklevel=2)
        return True
    return False


class _Journal(JournalFileBackend):
    """A journal of whole lines, also where the disk had no room for the last one."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _lock(path))
        self._path = path
        data = path.read_bytes()
        if not HEAD.startswith(data[: len(HEAD)]):
            raise ValueError(f"it begins with {data[: len(HEAD)]!r}")
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            json.loads(line)  # Optuna says nothing of the last one until it reads another
        _drop_cut_line(path)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError:
            with suppress(OSError):
                _drop_cut_line(self._path)
            raise


def _journal(path: Path, remedy: str) -> Any:
    try:
        return optuna.storages.JournalStorage(_Journal(path))
    except (ValueError, KeyError) as error:
        raise BadInput(f"study {path} is damaged ({error}): {remedy}") from error


def _lock(journal: Path) -> JournalFileSymlinkLock:
    return JournalFileSymlinkLock(str(journal), GRACE_S)


def _drop_cut_line(path: Path) -> None:
    """A process killed while it wrote leaves half a line, which Optuna would append to. The lines
    before it are whole: a trial in flight is all that is lost."""
    if _whole_bytes(path) == path.stat().st_size:
        return
    lock = _lock(path)  # perhaps another process is writing it now
    lock.acquire()
    try:
        os.truncate(path, _whole_bytes(path))
    finally:
        lock.release()


def _whole_bytes(journal: Path) -> int:
    return journal.read_bytes().rfind(b"\n") + 1


def _open(url: str) -> Any:
    """Open a database. Of several who open an empty one at once, all but one fail to make its
    tables, and find them made a moment later."""
    for _ in range(TRIES):
        with suppress(IntegrityError, ProgrammingError):
            return optuna.storages.get_storage(url)
        time.sleep(WAIT_S)
    return optuna.storages.get_storage(url)


def _database(url: str) -> Any:
    kind = re.split(r"\W", url)[0]
    shown = f"{kind}..." if {"@", "?"} & set(url) else url  # it may hold a password
    driver, extra = DRIVERS.get(kind, (None, None))
    if driver is not None:
        url = url.replace(f"{kind}://", f"{kind}+{driver}://", 1)
    try:
        return _open(url)
    except ImportError as error:
        remedy = f"pip install 'autofit[{extra}]'" if extra else "install it"
        raise BadInput(f"storage {shown!r}: no driver for {kind} here: {remedy}") from error
    except (SQLAlchemyError, ValueError) as error:
        # A password with an @ of its own is taken for a part of the host, and said to be wrong.
        reason = re.sub(r"\S*@\S*", "...", str(error).splitlines()[0])
        raise BadInput(f"storage {shown!r}: {reason}; {EXAMPLES}") from error
