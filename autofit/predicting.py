"""What `autofit plan` does where it predicts. Of a model seen before, torch is not loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autofit import outlook
from autofit.goals import Goal
from autofit.spec import Device


@dataclass(frozen=True)
class Asked:
    """What is to be predicted: all budgets with all sizes; None is the card's, the model's own."""

    goal: Callable[[str | int, str | None], Goal]
    budgets: Sequence[str | None]
    sizes: Sequence[str | None]
    is_table: bool


def predict(
    model: str,
    asked: Asked,
    gpu: str | None,
    device: str | None,
    dtype: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    if gpu is None and device is None:
        from autofit import session

        device = session.default_device()
    card = outlook.card(gpu, device)
    whole_bytes = outlook.whole_card_bytes(gpu, card)
    budgets = [whole_bytes if b is None else b for b in asked.budgets]
    goals = [asked.goal(b, s) for s in asked.sizes for b in budgets]
    if note := outlook.larger_than(card, goals):
        print(f"autofit: {note}", file=sys.stderr)
    found = outlook.outlooks(model, goals, _hosted(card, goals[0], gpu), dtype)
    if asked.is_table:
        if as_json:
            print(json.dumps([outlook.document(o) for o in found], indent=2))
        else:
            print(outlook.table(found))
        return
    forecast = outlook.fitting(found[0])
    if output is not None:
        from autofit import store

        store.save_document(outlook.document(found[0]), output)
    if as_json:
        print(json.dumps(outlook.document(found[0]), indent=2))
    else:
        print(outlook.lines(found[0], forecast))


def _hosted(card: Device, goal: Goal, gpu: str | None) -> Device:
    """With the host memory that is asked for; where that of a table's card is assumed, with more
    too."""
    if gpu is not None and goal.host_ram_bytes is not None:
        return replace(card, host_limit_bytes=goal.host_ram_bytes)
    return goal.hosted(card)
