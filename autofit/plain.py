"""The nouns as plain data, for files and ``--json``, and plain data as YAML and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import yaml

from autofit.spec import Evidence, Measurement, Plan, Profile, Technique

SCHEMA = 2  # of the profile document; a change of its keys or their meaning adds one
MAX_DEPTH = 12  # the deepest value of a profile is at depth 6
MAX_NODES = 50_000  # a profile has some 200, and 100 more for each machine; read in 1 s


def plain(value: Any) -> Any:
    """Turn a noun into dicts, lists and scalars, without rounding.

    A technique becomes ``{technique: name, **settings}`` and a plan the list of its techniques.
    """
    if isinstance(value, Technique):
        return {"technique": value.name, **plain(value.settings)}
    if isinstance(value, Plan):
        return plain(value.techniques)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def document(profile: Profile) -> dict[str, Any]:
    """Lay a profile out as it is stored: the keys of schema 2, in order, empty lists left out."""
    described = {"components": plain(profile.components), "adapters": plain(profile.adapters)}
    added = {"ladder": plain(profile.ladder), "evidence": [*map(_evidence, profile.evidence)]}
    return {
        "schema": SCHEMA,
        "pipeline": {"cls": profile.pipeline, "fingerprint": profile.fingerprint}
        | _filled(described),
        "workload": plain(profile.workload),
        "budget_bytes": profile.budget_bytes,
        "plan": plain(profile.plan),
        "measured": plain(profile.measured),
        "on": plain(profile.on),
        **_filled(added),
    }


def _filled(lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: items for key, items in lists.items() if items}


def _evidence(evidence: Evidence) -> dict[str, Any]:
    outcome = plain(evidence.outcome)
    if isinstance(evidence.outcome, Measurement):
        return {"measured": outcome, "on": plain(evidence.on)}
    for key in ("detail", "step_s"):  # a whole run is not ended for being slow
        del outcome[key]
    return {"failure": outcome, "on": plain(evidence.on)}


# ---------------------------------------------------------------- YAML


def _fault(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _Loader(yaml.SafeLoader):
    """Plain data only: the scalars of YAML 1.2, and nothing that could surprise or grow.

    Aliases can expand without bound, tags reach constructors that fail in many ways, and YAML 1.1
    reads 1:30 as 90 and 010 as 8.
    """

    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _fault("anchors are not read", event)
        if getattr(event, "tag", None):
            raise _fault("tags are not read", event)
        if self.depth == MAX_DEPTH:
            raise _fault("nested too deeply", event)
        if self.nodes == MAX_NODES:
            raise _fault(f"more than {MAX_NODES} values", event)
        self.nodes += 1
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a key is not text", key)
            if key.value in seen:
                raise _fault(f"{key.value!r} is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]{0,18})", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*([eE][-+][0-9]+)?|\.inf)|\.nan", list("-+.0123456789")),
):
    _whole = re.compile(rf"(?:{_pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first)


_LINE_ENDS = re.compile("[\r\x85\u2028\u2029\ufeff]")


class _Dumper(yaml.SafeDumper):
    """Block style, with a list of numbers on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        flat = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)

    def represent_str(self, data: str) -> Any:
        """YAML folds the line ends of Unicode unless they are escaped, as double quotes do."""
        quoted = '"' if _LINE_ENDS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=quoted)


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(data: Any) -> str:
    """Write plain data as YAML that ``from_yaml`` reads back exactly."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def from_yaml(text: str) -> Any:
    """Read YAML as plain data.

    Raises:
        ValueError: it is not YAML, or not the part of it that profiles use.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"not YAML: {line}{error.problem}") from error
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise ValueError(f"not YAML: {getattr(error, 'reason', 'unreadable')}") from error
