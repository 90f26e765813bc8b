"""Plan every budget at every size that people use, on this machine's GPU: a JSON line a cell.

    python scripts/record_matrix.py --out DIR [--only sdxl,sd15] [--limit 25] [--deadline 540]

What was tried for a budget is known to the next smaller one of the same model and size, and below
one that nothing fits nothing is tried. The cells of one model share a worker, as in
`record_trials.py`, and the lines are as there. What DIR has already is not planned again: the same
command goes on from there. `make_profiles.py` ships what comes of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record_trials import Case, append, record

from autofit import session
from autofit.units import format_bytes, parse_size

BUDGETS = ("24GiB", "16GiB", "12GiB", "8GiB", "6GiB", "4GiB")  # the largest first


@dataclass(frozen=True)
class Model:
    """Sizes by how many people use them, and the steps of an image."""

    name: str
    steps: int
    sizes: tuple[str, ...]
    budgets: tuple[str, ...] = BUDGETS

    def columns(self) -> list[list[Case]]:
        """The cells of each size, the largest budget first."""
        return [[Case(self.name, b, size, self.steps) for b in self.budgets] for size in self.sizes]


MODELS = (
    Model("sdxl", 30, ("1024x1024", "1536x1024", "768x768", "3840x2160")),
    Model("sd15", 30, ("512x512", "768x768", "1024x1024", "1536x1024", "3840x2160")),
    Model("flux-dev", 28, ("1024x1024", "1536x1024", "768x768", "512x512")),
    Model("sd35-medium", 28, ("1024x1024", "1536x1024", "768x768", "512x512")),
    Model("pixart-sigma", 20, ("1024x1024", "1536x1024", "768x768", "512x512", "3840x2160")),
)
TINY = (Model("tiny-sd", 2, ("64x64",), ("2GiB", "1GiB", "2MiB", "1MiB")),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--only", default="", help="names of models, in the order to plan them")
    parser.add_argument("--limit", type=float, default=25.0, help="seconds of search a cell")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds to begin cells in")
    parser.add_argument("--device", default=session.default_device())
    options = parser.parse_args()
    known = {model.name: model for model in MODELS + TINY}
    wanted = [name for name in options.only.split(",") if name] or [m.name for m in MODELS]
    if unknown := set(wanted) - set(known):
        parser.error(f"no model {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    end = time.monotonic() + options.deadline
    path = options.out / "results.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    done = {name_of(line): line for line in map(json.loads, lines)}
    with path.open("a", encoding="utf-8") as out:
        for model in map(known.__getitem__, wanted):
            columns = model.columns()
            if all(case.name in done for column in columns for case in column):
                continue
            if time.monotonic() > end:
                return
            asked = f"--only {model.name} --limit {options.limit:g}"
            command = f"python scripts/record_matrix.py --out DIR {asked}"
            with session.measuring(model.name, options.device) as measurer:
                given = {"device": options.device, "limit_s": options.limit}
                plan = functools.partial(record, measurer=measurer, **given)
                for column in columns:
                    for line in planned(column, plan, command, done, end):
                        append(line, out)


def planned(
    column: list[Case], plan: Callable[..., Any], command: str, done: dict[str, Any], end: float
) -> Iterator[dict[str, Any]]:
    """Plan the budgets of one size, the largest first: a line of each that is not done."""
    after, smallest_bytes = None, 0
    for case in column:
        line = done.get(case.name)
        if line is None:
            if time.monotonic() > end:
                return
            if parse_size(case.budget) < smallest_bytes:
                line = too_small(case, smallest_bytes)
            else:
                line, found = plan(case, after=after)
                line["command"] = command
                after = found or after
            yield line
        smallest_bytes = max(smallest_bytes, line["smallest_bytes"] or 0)


def too_small(case: Case, smallest_bytes: int) -> dict[str, Any]:
    error = f"{case.budget}: the smallest that works is {format_bytes(smallest_bytes)}"
    told = {"error": error, "smallest_bytes": smallest_bytes, "plan_s": 0.0}
    return {"case": asdict(case), "command": None, "found": None} | told


def name_of(line: dict[str, Any]) -> str:
    return Case(**line["case"]).name


if __name__ == "__main__":
    main()
