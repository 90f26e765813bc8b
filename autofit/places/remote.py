"""A place behind a URL, read and written through fsspec within bounds of time and size.

What it holds is said by its ``index.json``, since not every server lists a folder. Nothing there is
trusted: names lead nowhere else, sizes are bounded, and a file is what its digest says.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autofit import store
from autofit.files import write_whole
from autofit.places.entry import Entry, first_fault, to_json
from autofit.places.index import Index, Row
from autofit.spec import BadInput
from autofit.units import format_bytes

T = TypeVar("T")

INDEX = "index.json"
KINDS = "https://..., s3://..., hf://datasets/... or a folder"
SCHEMA = 1  # of index.json
TIMEOUT_S = 10.0  # for one file, whatever the server does
MAX_FILES = 10_000  # of one index.json
MAX_INDEX_BYTES = 2**24  # 10,000 rows of some 700 bytes, twice
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,249}\.yaml$"


class _Listed(BaseModel):
    model_config = ConfigDict(strict=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    entry: Entry


class _Listing(BaseModel):
    model_config = ConfigDict(strict=True)

    schema_version: Literal[1] = Field(alias="schema")  # pydantic has a method named schema
    files: Annotated[
        dict[Annotated[str, Field(pattern=NAME)], _Listed], Field(max_length=MAX_FILES)
    ]


# ---------------------------------------------------------------- index.json


def refresh(index: Index, url: str) -> None:
    """Bring the index up to date with a place's ``index.json``.

    Raises:
        BadInput: the place cannot be reached, or has no such file, or none that is an index.
    """
    raw = read(url, INDEX, MAX_INDEX_BYTES)
    stamp = _digest(raw)
    if index.stamp(url) != stamp:
        index.update(url, _rows(url, raw), index.stamps(url), stamp)


def rows(url: str) -> list[Row]:
    """Read what a place's ``index.json`` lists. Raises as ``refresh`` does."""
    return _rows(url, read(url, INDEX, MAX_INDEX_BYTES))


def _rows(url: str, raw: bytes) -> list[Row]:
    try:
        listing = _Listing.model_validate_json(raw)
    except ValidationError as error:
        reason = first_fault(error)
        raise BadInput(f"place {shown(url)}: {INDEX} is no index of profiles ({reason})") from error
    return [Row(name, f.sha256, f.sha256, to_json(f.entry)) for name, f in listing.files.items()]


def listing(url: str, rows: Iterable[Row]) -> bytes:
    """Write the rows of a place as its ``index.json``.

    Raises:
        BadInput: more than a reader takes.
    """
    lines = [
        f'{json.dumps(row.name)}: {{"sha256": "{row.sha256}", "entry": {row.facts}}}'
        for row in rows
    ]
    if len(lines) > MAX_FILES:
        raise BadInput(
            f"place {shown(url)}: {len(lines)} profiles, and {INDEX} holds {MAX_FILES}: use another"
        )
    return '{{"schema": {}, "files": {{\n{}\n}}}}\n'.format(SCHEMA, ",\n".join(lines)).encode()


# ---------------------------------------------------------------- files


def fetch(url: str, name: str, sha256: str | None = None) -> Path:
    """Copy a place's file into the user's folder, unless it is there with this digest.

    Raises:
        BadInput: it cannot be reached or kept, is too large, or has another digest.
    """
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    target = store.folder() / "places" / key / name
    try:
        if sha256 is not None and target.is_file() and _digest(target.read_bytes()) == sha256:
            return target
        data = read(url, name, store.MAX_BYTES)
        if sha256 is not None and _digest(data) != sha256:
            raise BadInput(f"profile {shown(url)}/{name}: not what {INDEX} lists: push it anew")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)
    except OSError as error:
        reason = f"cannot be kept ({error.strerror or error}): set AUTOFIT_HOME to another folder"
        raise BadInput(f"profile {target}: {reason}") from error
    return target


def read(url: str, name: str, limit_bytes: int) -> bytes:
    """Read one file of a place.

    Raises:
        BadInput: it cannot be reached, or is larger than ``limit_bytes``.
    """
    data = _answer(url, f"read {name}", lambda: _read(f"{url}/{name}", limit_bytes + 1))
    if len(data) > limit_bytes:
        raise BadInput(f"{shown(url)}/{name}: larger than {format_bytes(limit_bytes)}")
    return data


def write(url: str, name: str, data: bytes) -> None:
    """Write one file of a place; an object store shows it whole or not at all.

    Raises:
        BadInput: it cannot be written.
    """
    _answer(url, f"write {name}", lambda: _write(f"{url}/{name}", data))


def names(url: str) -> set[str]:
    """List all files of a place that can be listed; none where there is no such folder yet.

    Raises:
        BadInput: it cannot be reached.
    """
    return {path.rpartition("/")[2] for path in _answer(url, "list it", lambda: _list(url))}


def is_name(name: str) -> bool:
    """Whether this can be a profile's file in a place: nothing that leads out of it."""
    return re.fullmatch(NAME, name) is not None


def shown(url: str) -> str:
    """The URL without the password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", url)


def _read(url: str, most_bytes: int) -> bytes:
    system, path = _system(url)
    data = bytearray()
    with system.open(path, "rb") as file:
        while part := file.read(most_bytes - len(data)):  # a stream returns what has come so far
            data += part
    return bytes(data)


def _write(url: str, data: bytes) -> None:
    system, path = _system(url)
    system.pipe_file(path, data)


def _list(url: str) -> list[str]:
    system, path = _system(url)
    try:
        return list(system.ls(path, detail=False))
    except FileNotFoundError:
        return []


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _system(url: str) -> tuple[Any, str]:
    system, path = fsspec.core.url_to_fs(url)
    system.invalidate_cache()  # another process may have written since
    return system, path


def _answer(url: str, what: str, action: Callable[[], T]) -> T:
    """Call ``action``; whatever a file system raises is one line about the place."""
    try:
        return _within(action)
    except ImportError as error:
        reason = f"needs a package ({error}): pip install 'autofit[urls]'"
    except Exception as error:  # each file system has errors of its own
        reason = _reason(what, error)
    raise BadInput(f"place {shown(url)}: {reason}")


def _reason(what: str, error: BaseException) -> str:
    # The one for HTTP says "not found" of a server that does not answer, with the true cause.
    if isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, OSError):
        hint = "autofit profiles push makes one" if what.endswith(INDEX) else "check the address"
        return f"cannot {what}: not found; {hint}"
    told = error.__cause__ if isinstance(error, FileNotFoundError) else error
    said = shown(" ".join(str(told).split()))[:200]
    is_unknown = said.startswith("Protocol not known")
    hint = f"write {KINDS}" if is_unknown else "check the address and the network"
    return f"cannot {what} ({type(told).__name__}: {said}): {hint}"


def _within(action: Callable[[], T]) -> T:
    """Call in a thread that is left behind where it takes longer than TIMEOUT_S."""
    answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((action(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {TIMEOUT_S:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
