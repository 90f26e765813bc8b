"""The user's folder of profiles, each with the trials behind it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs

from autofit.formats import MAX_BYTES, load, save, save_document, write
from autofit.plain import plain
from autofit.spec import BadInput, Profile
from autofit.units import format_bytes

__all__ = [
    "MAX_BYTES",
    "folder",
    "keep",
    "keep_why",
    "load",
    "load_why",
    "save",
    "save_document",
    "with_kept",
]

WHY = ".why.json"  # beside a profile: the trials behind it


def folder() -> Path:
    """Where autofit keeps its files: ``$AUTOFIT_HOME``, else the user's data folder."""
    home = os.environ.get("AUTOFIT_HOME")
    if home:
        return Path(home).expanduser()
    return platformdirs.user_data_path("autofit", appauthor=False)


def keep(profile: Profile) -> Path:
    """Store a profile where ``apply`` looks, in place of one of the same plan for the same.

    Raises:
        BadInput: the folder cannot be written to.
    """
    target = _kept(profile)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be made ({error.strerror or error}): set AUTOFIT_HOME to another folder"
        raise BadInput(f"folder {target.parent}: {reason}") from error
    save(profile, target)
    return target


def with_kept(profile: Profile) -> Profile:
    """The profile with the evidence that this folder has of it: a file that somebody sends says
    nothing of what came of it here."""
    path = _kept(profile)
    if not path.exists():
        return profile
    try:
        kept = load(path)
    except BadInput as error:
        warnings.warn(f"passed over: {error}", stacklevel=2)
        return profile
    machines = {evidence.on.machine for evidence in kept.evidence}
    others = (e for e in profile.evidence if e.on.machine not in machines)
    return replace(profile, evidence=(*others, *kept.evidence))


def keep_why(path: Path, why: Mapping[str, Any]) -> None:
    """Store, beside a profile, the trials behind it and what was not tried."""
    write(json.dumps(why, indent=1), path.with_suffix(WHY))


def load_why(path: str | Path) -> Any:
    """Read what ``keep_why`` stored for a profile, beside it or in the folder, or None."""
    for place in (Path(path), _kept(load(path))):
        try:
            return json.loads(place.with_suffix(WHY).read_text("utf-8"))
        except (OSError, ValueError):
            continue
    return None


def _kept(profile: Profile) -> Path:
    return folder() / "profiles" / _file_name(profile)


def _file_name(profile: Profile) -> str:
    """The same for the same plan for the same on the same, whatever was measured."""
    shape, on = profile.workload, profile.on
    parts = (
        profile.pipeline,
        on.device,
        format_bytes(profile.budget_bytes).replace(" ", ""),
        f"{shape.width}x{shape.height}b{shape.batch}s{shape.steps}",
    )
    setting = (on.device, on.capability, on.total_bytes, on.cap, on.versions)
    facts = (
        profile.pipeline, profile.fingerprint, shape, profile.budget_bytes, profile.plan, setting
    )  # fmt: skip
    key = hashlib.sha256(json.dumps(plain(facts), sort_keys=True).encode()).hexdigest()[:8]
    safe = [re.sub(r"[^A-Za-z0-9._]+", "-", part)[:60] for part in parts]
    return "--".join([*safe, key]) + ".yaml"
