"""Where Optuna keeps a study: a database by URL, else a journal in the user's data folder."""

from __future__ import annotations

import json
import os
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from autofit import store
from autofit.spec import BadInput

TRIES, WAIT_S = 4, 0.5  # to open a database whose tables others are making


def storage(url: str | None, name: str, *, fresh: bool = False) -> Any:
    """Open the storage for a study. With ``fresh``, what it holds of the study is forgotten.

    Raises:
        BadInput: a URL that opens nothing, a folder that cannot be written, a damaged journal.
    """
    if url is not None:
        return _database(url, name, fresh)
    path = store.folder() / "studies" / f"{name}.journal"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh and path.exists():
            os.replace(path, path.with_suffix(".old"))
        return _journal(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def image(name: str, *, fresh: bool = False) -> Path:
    """Where a study keeps the image that its trials are compared with. With ``fresh``, the one that
    is there is forgotten; so is a damaged one.

    Raises:
        BadInput: a folder that cannot be written.
    """
    path = store.folder() / "studies" / f"{name}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh or not zipfile.is_zipfile(path):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> BadInput:
    reason = error.strerror or error
    return BadInput(f"study {path}: {reason}; set AUTOFIT_HOME to another folder")


def _journal(path: Path) -> Any:
    _drop_cut_line(path)
    try:
        for line in path.read_bytes().splitlines() if path.exists() else ():
            json.loads(line)  # Optuna says nothing of the last one until it reads another
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    except ValueError as error:
        raise BadInput(f"study {path} is damaged ({error}): start anew with --fresh") from error


def _drop_cut_line(path: Path) -> None:
    """A process killed while it wrote leaves half a line, which Optuna would append to. The lines
    before it are whole: a trial in flight is all that is lost."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        partial = path.with_suffix(".tmp")
        partial.write_bytes(whole)
        partial.replace(path)


def _open(url: str) -> Any:
    """Open a database. Of several who open an empty one at once, all but one fail to make its
    tables, and find them made a moment later."""
    for _ in range(TRIES):
        with suppress(IntegrityError, ProgrammingError):
            return optuna.storages.get_storage(url)
        time.sleep(WAIT_S)
    return optuna.storages.get_storage(url)


def _database(url: str, name: str, fresh: bool) -> Any:
    try:
        opened = _open(url)
    except ImportError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(
            f"storage {url!r}: {reason}; install the database's driver, as psycopg2-binary for"
            " postgresql://"
        ) from error
    except (SQLAlchemyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"storage {url!r}: {reason}; write as sqlite:///studies.db") from error
    if fresh:
        with suppress(KeyError):  # there is no such study yet
            optuna.delete_study(study_name=name, storage=opened)
    return opened
