"""What a profile's document may hold, for every known technique: its JSON schema, and the check."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from functools import cache
from typing import Annotated, Any, Literal, Union, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    create_model,
    model_validator,
)

from autofit.spec import (
    Environment,
    Evidence,
    Failure,
    Measurement,
    Part,
    Phase,
    Technique,
    Why,
    Workload,
)
from autofit.techniques import KINDS

STRICT = ConfigDict(extra="forbid", strict=True)


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


_Measured = Annotated[Measurement, AfterValidator(_possible)]


class _PipelineId(BaseModel):
    model_config = STRICT

    cls: str
    fingerprint: str
    components: tuple[Part, ...] = ()
    adapters: tuple[str, ...] = ()


class _Failed(BaseModel):
    """A failure without its words, which may hold a path."""

    model_config = STRICT

    why: Why
    phase: Phase | None = None
    needed_bytes: int | None = None


class _Evidence(BaseModel):
    model_config = STRICT

    measured: _Measured | None = None
    failure: _Failed | None = None
    on: Environment

    @model_validator(mode="after")
    def _one(self) -> _Evidence:
        if (self.measured is None) == (self.failure is None):
            raise ValueError("one of measured and failure")
        return self

    def noun(self) -> Evidence:
        if self.measured is not None:
            return Evidence(self.measured, self.on)
        assert self.failure is not None
        failed = self.failure
        return Evidence(Failure(failed.why, "", failed.phase, failed.needed_bytes), self.on)


class _Document(BaseModel):
    """A profile file but for its plans, which ``document_model`` adds from the techniques."""

    model_config = STRICT

    schema_version: Literal[2] = Field(alias="schema")  # pydantic has a method named schema
    pipeline: _PipelineId
    workload: Annotated[Workload, AfterValidator(_counts)]
    budget_bytes: PositiveInt
    measured: _Measured
    on: Environment
    evidence: list[_Evidence] = []


def _entry_model(kind: type[Technique]) -> type[BaseModel]:
    """The plan entry of one technique, ``technique`` being what tells the entries apart."""
    hints = get_type_hints(kind)
    keys: dict[str, Any] = {"technique": (Literal[kind.name], ...)}
    for setting in fields(kind):
        default = ... if setting.default is MISSING else setting.default
        keys[setting.name] = hints[setting.name], default
    return create_model(kind.__name__, __config__=STRICT, __doc__=kind.__doc__, **keys)


@cache
def document_model() -> type[_Document]:
    """What a document of the current version is checked against."""
    entry: Any = Union[tuple(_entry_model(kind) for kind in KINDS.values())]  # noqa: UP007
    plan: Any = list[Annotated[entry, Field(discriminator="technique")]]
    rung = create_model("Rung", __config__=STRICT, plan=(plan, ...), measured=(_Measured, ...))
    keys: Any = {"plan": (plan, ...), "ladder": (list[rung], [])}  # type: ignore[valid-type]
    about = "A plan for a pipeline, and what it was measured on."
    return create_model("Profile", __base__=_Document, __doc__=about, **keys)


def json_schema() -> dict[str, Any]:
    """Describe the profile format as JSON schema, with the settings of every known technique."""
    return document_model().model_json_schema()
