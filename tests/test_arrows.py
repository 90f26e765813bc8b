"""A file imports only from the rows above its own, so that no two files need each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autofit"
ROWS = (
    {"spec", "interrupts", "lazy"},
    {"units"},
    {"plain"},
    {"anatomy", "fallbacks", "files", "host", "roofline", "tiling"},
    {"child", "pinning"},
    {"streaming"},
    {"architectures", "techniques", "cost", "probe", "gpus"},
    {"phases", "rooms", "goals", "host_budget", "limits", "match", "schema"},
    {"surrogate", "formats"},
    {"sampler"},
    {"ledger"},
    {"search", "store", "trial", "report"},
    {
        "budgeted",
        "studies",
        "dryrun",
        "places",
        "tables",
        "retrying",
        "prompts",
        "living",
        "lifeline",
    },
    {"planner", "forecast", "trust"},
    {"applied"},
    {"session", "outlook", "foresight"},
    {"team"},
    {"__init__", "commands", "predicting", "shelf", "verifying"},
    {"budgets"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def imported(source: str, file: Path) -> Iterator[str]:
    """The rows' names that a file of the package imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (entry(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, file)
            yield from (entry(f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (entry(a.value) for a in node.args if isinstance(a, ast.Constant))


def absolute(node: ast.ImportFrom, file: Path) -> str:
    if node.level == 0:
        return node.module or ""
    package = ("autofit", *file.parts[:-1])[: 1 + len(file.parts) - node.level]
    return ".".join((*package, *filter(None, [node.module])))


def entry(module: str) -> str:
    """``autofit.techniques.decode`` is the entry techniques; what is not ours is the entry ""."""
    first, *rest = module.split(".")
    if first != "autofit":
        return ""
    return rest[0] if rest and rest[0] in LEVEL else "__init__"


def wrong(source: str, file: Path) -> list[str]:
    own = file.parts[0].removesuffix(".py")
    return [
        f"{file} imports {name}"
        for name in imported(source, file)
        if name and name != own and LEVEL[name] >= LEVEL[own]
    ]


def files() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", files(), ids=str)
def test_arrows_point_up(file: Path) -> None:
    assert file.parts[0].removesuffix(".py") in LEVEL, f"give {file} its row"
    assert wrong((PACKAGE / file).read_text("utf-8"), file) == []


@pytest.mark.parametrize(
    ("source", "file", "name"),
    [
        ("from autofit.search import Study", "spec.py", "search"),
        ("import autofit.cli", "session.py", "cli"),
        ("import torch, autofit.trial", "store.py", "trial"),
        ("from autofit import report", "store.py", "report"),
        ("from autofit import apply", "techniques/decode.py", "__init__"),
        ("def f():\n    from autofit.cost import predict", "techniques/decode.py", "cost"),
        ("from ..probe.device import probe_device", "techniques/decode.py", "probe"),
        ("from .. import session", "probe/device.py", "session"),
        ("from . import session", "spec.py", "session"),
        ("import importlib\nimportlib.import_module('autofit.cli')", "cost.py", "cli"),
    ],
)
def test_a_wrong_import_is_found(source: str, file: str, name: str) -> None:
    assert wrong(source, Path(file)) == [f"{file} imports {name}"]


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("from autofit.spec import Plan\nimport torch", "techniques/decode.py"),
        ("from .precision import HalfPrecision", "techniques/decode.py"),
        ("from autofit import techniques, cost", "search.py"),
        ("def f():\n    from autofit import session", "__init__.py"),
        ("import autofit_extras", "spec.py"),
    ],
)
def test_a_right_import_is_let_be(source: str, file: str) -> None:
    assert wrong(source, Path(file)) == []
