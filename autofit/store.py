"""Profiles as YAML files: written whole or not at all, read with every fault in one line."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_type_hints

import platformdirs
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    create_model,
)

from autofit.plain import SCHEMA, document, from_yaml, to_yaml
from autofit.spec import (
    BadInput,
    Device,
    Environment,
    Fidelity,
    Measurement,
    Plan,
    Profile,
    Technique,
    Workload,
)
from autofit.techniques import KINDS
from autofit.units import format_bytes

MAX_BYTES = 2**20  # a profile is some 3 KB
WHY = ".why.json"  # beside a profile: the trials behind it
VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "cuda", "driver")


# ---------------------------------------------------------------- the document


def _counts(workload: Workload) -> Workload:
    for name, count in vars(workload).items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1")
    return workload


def _possible(measured: Measurement) -> Measurement:
    if not 0 < measured.image_s < math.inf:
        raise ValueError("image_s must be a time above zero")
    if measured.peak_bytes < 0:
        raise ValueError("peak_bytes must not be negative")
    return measured


class _PipelineId(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    cls: str
    fingerprint: str


class _Document(BaseModel):
    """A profile file but for its plan, which ``_document_model`` adds from the techniques."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1] = Field(alias="schema")  # pydantic has a method named schema
    pipeline: _PipelineId
    workload: Annotated[Workload, AfterValidator(_counts)]
    budget_bytes: PositiveInt
    measured: Annotated[Measurement, AfterValidator(_possible)]
    on: Environment


def _entry_model(kind: type[Technique]) -> type[BaseModel]:
    """The plan entry of one technique, ``technique`` being what tells the entries apart."""
    hints = get_type_hints(kind)
    keys: dict[str, Any] = {"technique": (Literal[kind.name], ...)}
    for setting in fields(kind):
        default = ... if setting.default is MISSING else setting.default
        keys[setting.name] = hints[setting.name], default
    return create_model(
        kind.__name__,
        __config__=ConfigDict(extra="forbid", strict=True),
        __doc__=kind.__doc__,
        **keys,
    )


@cache
def _document_model() -> type[_Document]:
    entry: Any = Union[tuple(_entry_model(kind) for kind in KINDS.values())]  # noqa: UP007
    plan: Any = list[Annotated[entry, Field(discriminator="technique")]]
    about = "A plan for a pipeline, and what it was measured on."
    return create_model("Profile", __base__=_Document, __doc__=about, plan=(plan, ...))


def json_schema() -> dict[str, Any]:
    """Describe the profile format as JSON schema, with the settings of every known technique."""
    return _document_model().model_json_schema()


# ---------------------------------------------------------------- one file


def save(profile: Profile, path: str | Path) -> None:
    """Write a profile so that a reader sees the old file or the new one, never a part.

    Raises:
        BadInput: the folder is missing or cannot be written to.
    """
    how = "whole generations" if profile.measured.verified else "a short trial"
    header = f"# autofit profile: measured in {how}; use: autofit.apply(pipe, profile=FILE)\n"
    _write(header + to_yaml(document(profile)), Path(path))


def save_document(data: Mapping[str, Any], path: str | Path) -> None:
    """Write a prediction's document, as a profile's is written.

    Raises:
        BadInput: the folder is missing or cannot be written to.
    """
    _write("# autofit prediction: not measured, and so not applied\n" + to_yaml(data), Path(path))


def _write(text: str, target: Path) -> None:
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}): give another path"
        raise BadInput(f"profile {target}: {reason}") from error
    finally:
        with suppress(OSError):  # there when the writing failed
            partial.unlink()


def load(path: str | Path) -> Profile:
    """Read a profile file.

    Raises:
        BadInput: no such file, or not a profile; the message names the file and the field.
    """
    try:
        return _profile(from_yaml(_text(Path(path))))
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


def _profile(data: Any) -> Profile:
    if not isinstance(data, dict):
        raise ValueError("not a mapping of schema, pipeline, ..., on: not a profile")
    version = data.get("schema")
    if isinstance(version, int) and version > SCHEMA:
        raise ValueError(
            f"schema {version} is newer than this autofit reads ({SCHEMA}): upgrade autofit"
        )
    if "predicted" in data:
        raise ValueError("a prediction, which nothing measured: run autofit plan on that card")
    # By way of JSON, where strict validation takes a list for a tuple and text for an enum.
    found: Any = _document_model().model_validate_json(json.dumps(data))
    techniques = [KINDS[entry.technique](**_settings(entry)) for entry in found.plan]
    return Profile(
        pipeline=found.pipeline.cls,
        fingerprint=found.pipeline.fingerprint,
        workload=found.workload,
        budget_bytes=found.budget_bytes,
        plan=Plan(tuple(techniques)),
        measured=found.measured,
        on=found.on,
    )


def _settings(entry: BaseModel) -> dict[str, Any]:
    return {name: value for name, value in entry if name != "technique"}


def _reason(error: ValidationError) -> str:
    """The first fault, with the path of its field: ``measured.peak_bytes``."""
    first = error.errors(include_url=False)[0]
    kind, path = first["type"], list(first["loc"])
    if path[:1] == ["plan"]:
        del path[2:3]  # the technique's name, which is not a key of the file
    where = ".".join(str(part) for part in path)
    if kind == "missing":
        return f"missing field {where}: add it, or plan anew"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {where!r}: remove it, or upgrade autofit"
    if kind == "union_tag_not_found":
        return f"missing field {where}.technique: add it, or plan anew"
    if kind == "union_tag_invalid":
        return f"{where}: {_unknown(str(first['ctx']['tag']))}"
    if kind == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: {first['msg']}, not {repr(first['input'])[:40]}"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, KINDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(KINDS))}"
    return f"no technique {name!r}: {hint}"


# ---------------------------------------------------------------- the folder of profiles


def folder() -> Path:
    """Where autofit keeps its files: ``$AUTOFIT_HOME``, else the user's data folder."""
    home = os.environ.get("AUTOFIT_HOME")
    if home:
        return Path(home).expanduser()
    return platformdirs.user_data_path("autofit", appauthor=False)


def keep(profile: Profile) -> Path:
    """Store a profile for ``find``, in place of one of the same plan for the same.

    Raises:
        BadInput: the folder cannot be written to.
    """
    target = folder() / "profiles" / _file_name(profile)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be made ({error.strerror or error}): set AUTOFIT_HOME"
        raise BadInput(f"folder {target.parent}: {reason}") from error
    save(profile, target)
    return target


def keep_why(path: Path, why: Mapping[str, Any]) -> None:
    """Store, beside a profile, the trials behind it and what was not tried."""
    _write(json.dumps(why, indent=1), path.with_suffix(WHY))


def load_why(path: str | Path) -> Any:
    """Read what ``keep_why`` stored for a profile, beside it or in the folder, or None."""
    kept = folder() / "profiles" / _file_name(load(path))
    for place in (Path(path), kept):
        try:
            return json.loads(place.with_suffix(WHY).read_text("utf-8"))
        except (OSError, ValueError):
            continue
    return None


def _file_name(profile: Profile) -> str:
    shape = profile.workload
    parts = (
        profile.pipeline,
        profile.on.device,
        format_bytes(profile.budget_bytes).replace(" ", ""),
        f"{shape.width}x{shape.height}b{shape.batch}s{shape.steps}",
    )
    facts = {k: v for k, v in document(profile).items() if k != "measured"}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    safe = [re.sub(r"[^A-Za-z0-9._]+", "-", part)[:60] for part in parts]
    return "--".join([*safe, key]) + ".yaml"


def find(
    fingerprint: str,
    workload: Workload,
    budget_bytes: int,
    device: Device,
    at_worst: Fidelity = Fidelity.LOSSY,
) -> Profile | None:
    """Look up the fastest stored profile that was measured for exactly this, on this.

    The device's name and bytes and the versions of what runs must be the same, and the plan as
    faithful as ``at_worst``. A file that is not a profile is passed over with a warning.
    """
    asked = (fingerprint, workload, budget_bytes, _setting(device.name, device))
    found: list[Profile] = []
    for path in sorted((folder() / "profiles").glob("*.yaml")):
        try:
            profile = load(path)
        except BadInput as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
            continue
        on = _setting(profile.on.device, profile.on)
        stored = (profile.fingerprint, profile.workload, profile.budget_bytes, on)
        fits = profile.measured.peak_bytes <= budget_bytes
        if stored == asked and fits and profile.plan.fidelity.rank <= at_worst.rank:
            found.append(profile)
    return min(found, key=lambda p: p.measured.image_s, default=None)


def _setting(name: str, on: Device | Environment) -> tuple[Any, ...]:
    return name, on.total_bytes, *(on.versions.get(package) for package in VERSIONS)
