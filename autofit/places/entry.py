"""What a profile is looked up by and listed with: its file says the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from autofit.spec import SOFTWARE, Device, Fidelity, Profile, Workload

MOST = 2**63 - 1  # what is larger is no count and no size

Size = Annotated[int, Field(ge=0, le=MOST)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _counts(workload: Workload) -> Workload:
    for name, count in vars(workload).items():
        if not 1 <= count <= MOST:
            raise ValueError(f"{name} cannot be {count}")
    return workload


@dataclass(frozen=True)
class Entry:
    """The facts of one profile that an index holds, bounded as they may be a stranger's."""

    pipeline: str
    fingerprint: str
    workload: Annotated[Workload, AfterValidator(_counts)]
    budget_bytes: Size
    fidelity: Fidelity
    image_s: Seconds
    peak_bytes: Size
    device: str
    total_bytes: Size
    versions: Mapping[str, str] = field(hash=False)

    @classmethod
    def of(cls, profile: Profile) -> Entry:
        return cls(
            pipeline=profile.pipeline,
            fingerprint=profile.fingerprint,
            workload=profile.workload,
            budget_bytes=profile.budget_bytes,
            fidelity=profile.plan.fidelity,
            image_s=profile.measured.image_s,
            peak_bytes=profile.measured.peak_bytes,
            device=profile.on.device,
            total_bytes=profile.on.total_bytes,
            versions=dict(profile.on.versions),
        )

    @property
    def asked(self) -> str:
        """The question that this answers, as ``Question.key`` writes it."""
        return _key(
            self.fingerprint,
            self.workload,
            self.budget_bytes,
            (self.device, self.total_bytes, self.versions),
        )


@dataclass(frozen=True)
class Question:
    """What a stored profile must have been measured for, and on, to be applied as it is."""

    fingerprint: str
    workload: Workload
    budget_bytes: int
    device: Device
    at_worst: Fidelity = Fidelity.LOSSY

    @property
    def key(self) -> str:
        """The same for all that asks the same: an index holds it beside each entry."""
        on = self.device.name, self.device.total_bytes, self.device.versions
        return _key(self.fingerprint, self.workload, self.budget_bytes, on)

    def is_answered_by(self, entry: Entry) -> bool:
        """Whether it was measured for exactly this, fits, and is faithful enough."""
        fits = entry.peak_bytes <= self.budget_bytes
        return entry.asked == self.key and fits and entry.fidelity.rank <= self.at_worst.rank


def _key(
    fingerprint: str, workload: Workload, budget_bytes: int, on: tuple[str, int, Mapping[str, str]]
) -> str:
    name, total_bytes, versions = on
    setting = [name, total_bytes, [versions.get(package) for package in SOFTWARE]]
    return json.dumps([fingerprint, list(vars(workload).values()), budget_bytes, setting])


def to_json(entry: Entry) -> str:
    """Write an entry so that ``from_json`` reads it.

    Raises:
        ValueError: it holds what no index takes: a negative size, half of a Unicode character.
    """
    text = _adapter().dump_json(entry).decode()
    from_json(text)
    return text


def from_json(text: str) -> Entry:
    return _adapter().validate_json(text, strict=True)


def first_fault(error: ValueError) -> str:
    """Say in one line what is wrong, with the path of its field."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part)[:80] for part in first["loc"]) or "it"
    return f"{where}: {first['msg']}"


@cache
def _adapter() -> TypeAdapter[Entry]:
    return TypeAdapter(Entry)
