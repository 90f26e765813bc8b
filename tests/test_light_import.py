"""``import autofit`` is light: what is heavy is loaded by the first call that needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "optuna", "accelerate", "pydantic", "rich")
ROOT = Path(__file__).parent.parent


def loaded(statement: str) -> set[str]:
    """The heavy packages that one statement loads in a fresh interpreter."""
    code = f"import sys; {statement}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    run = [sys.executable, "-c", code]
    answer = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return set(answer.stdout.split()) & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    [
        "autofit",
        "autofit.child",
        "autofit.gpus",
        "autofit.spec",
        "autofit.techniques",
        "autofit.units",
    ],
)
def test_import_is_light(module: str) -> None:
    assert loaded(f"import {module}") == set()


@pytest.mark.parametrize("module", ["pydantic", "rich.table"])
def test_a_heavy_import_is_found(module: str) -> None:
    assert module.partition(".")[0] in loaded(f"import autofit, {module}")
