"""One profile as a YAML file: written whole or not at all, read with every fault in one line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autofit.files import write_whole
from autofit.plain import SCHEMA, document, from_yaml, to_yaml
from autofit.schema import document_model
from autofit.spec import BadInput, Plan, Profile, Rung, Technique
from autofit.techniques import KINDS
from autofit.units import format_bytes

MAX_BYTES = 2**20  # a profile is some 3 KB, and 1 KB more for each leaner plan and machine


# ---------------------------------------------------------------- documents of older versions


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 has more keys, and all of them may be missing."""
    return data | {"schema": 2}


# To the next version, by version.
_OLDER: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def _current(data: Any) -> dict[str, Any]:
    """The document as one of the current version.

    Raises:
        ValueError: it is none, or one that is newer, or a prediction's.
    """
    if not isinstance(data, dict):
        raise ValueError("not a mapping of schema, pipeline, ..., on: not a profile")
    if "predicted" in data:
        raise ValueError("a prediction, which nothing measured: run autofit plan on that card")
    found: dict[str, Any] = data
    while type(version := found.get("schema")) is int and version in _OLDER:
        found = _OLDER[version](found)
    if type(version) is int and version > SCHEMA:
        raise ValueError(
            f"schema {version} is newer than this autofit reads ({SCHEMA}): upgrade autofit"
        )
    return found


# ---------------------------------------------------------------- writing


def save(profile: Profile, path: str | Path) -> None:
    """Write a profile so that a reader sees the old file or the new one, never a part.

    Raises:
        BadInput: the folder is missing or cannot be written to.
    """
    how = "whole generations" if profile.measured.verified else "a short trial"
    header = f"# autofit profile: measured in {how}; use: autofit.apply(pipe, profile=FILE)\n"
    write(header + to_yaml(document(profile)), Path(path))


def save_document(data: Mapping[str, Any], path: str | Path) -> None:
    """Write a prediction's document, as a profile's is written.

    Raises:
        BadInput: the folder is missing or cannot be written to.
    """
    write("# autofit prediction: not measured, and so not applied\n" + to_yaml(data), Path(path))


def write(text: str, target: Path) -> None:
    """Write a file whole or not at all. Raises as ``save`` does."""
    try:
        write_whole(target, text.encode())
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}): give another path"
        raise BadInput(f"profile {target}: {reason}") from error


# ---------------------------------------------------------------- reading


def load(path: str | Path) -> Profile:
    """Read a profile file of any version.

    Raises:
        BadInput: no such file, or not a profile; the message names the file and the field.
    """
    try:
        return _profile(_current(from_yaml(_text(Path(path)))))
    except ValidationError as error:
        reason = _reason(error)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}): give the path of a profile"
    except ValueError as error:  # BadInput of a technique or a plan too
        reason = str(error)
    raise BadInput(" ".join(f"profile {path}: {reason}".split()))


def _text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"larger than {format_bytes(MAX_BYTES)}: not a profile")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}): not a profile") from error


def _profile(data: dict[str, Any]) -> Profile:
    # By way of JSON, where strict validation takes a list for a tuple and text for an enum.
    found: Any = document_model().model_validate_json(json.dumps(data))
    rungs = enumerate(found.ladder)
    return Profile(
        pipeline=found.pipeline.cls,
        fingerprint=found.pipeline.fingerprint,
        workload=found.workload,
        budget_bytes=found.budget_bytes,
        plan=_plan(found.plan, "plan"),
        measured=found.measured,
        on=found.on,
        components=found.pipeline.components,
        adapters=found.pipeline.adapters,
        ladder=tuple(Rung(_plan(r.plan, f"ladder.{i}.plan"), r.measured) for i, r in rungs),
        evidence=tuple(evidence.noun() for evidence in found.evidence),
    )


def _plan(entries: list[Any], where: str) -> Plan:
    techniques: list[Technique] = []
    for number, entry in enumerate(entries):
        settings = {name: value for name, value in entry if name != "technique"}
        try:
            techniques.append(KINDS[entry.technique](**settings))
        except BadInput as error:
            raise ValueError(f"{where}.{number}: {error}") from error
    try:
        return Plan(tuple(techniques))
    except BadInput as error:
        raise ValueError(f"{where}: {error}") from error


def _reason(error: ValidationError) -> str:
    """The first fault, with the path of its field: ``measured.peak_bytes``."""
    first = error.errors(include_url=False)[0]
    kind, path = first["type"], list(first["loc"])
    if "plan" in path:
        name = path.index("plan") + 2
        del path[name : name + 1]  # the technique's name, which is not a key of the file
    where = ".".join(str(part) for part in path)
    if kind == "missing":
        return f"missing field {where}: add it, or plan anew"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {where!r}: remove it, or upgrade autofit"
    if kind == "union_tag_not_found":
        return f"missing field {where}.technique: add it, or plan anew"
    if kind == "union_tag_invalid":
        return f"{where}: {_unknown(str(first['ctx']['tag']))}"
    if kind == "json_invalid":  # all that JSON does not take of what YAML does
        return "half of a Unicode character (a lone surrogate): remove it"
    if kind == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: {first['msg']}, not {repr(first['input'])[:40]}"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, KINDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(KINDS))}"
    return f"no technique {name!r}: {hint}"
