"""Memory planner and auto-tuner for diffusers pipelines: the fastest plan within a budget.

    fit = autofit.apply(pipe, budget="8GB")

Importing this is light: torch, diffusers and optuna are loaded by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autofit.spec import AutofitError, BadInput, NothingFits, Plan, Profile, Workload

if TYPE_CHECKING:
    from autofit.applied import Applied
    from autofit.session import apply, plan

__version__ = "0.1.0"
__all__ = [
    "Applied",
    "AutofitError",
    "BadInput",
    "NothingFits",
    "Plan",
    "Profile",
    "Workload",
    "apply",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in ("Applied", "apply", "plan"):
        from autofit import session

        return getattr(session, name)
    raise AttributeError(f"module 'autofit' has no attribute {name!r}")
