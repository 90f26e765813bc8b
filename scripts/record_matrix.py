"""Plan every budget at every size that people use, on this machine's GPU: a JSON line a cell.

    python scripts/record_matrix.py --out DIR [--only sdxl,sd15] [--limit 60] [--deadline 540]

First each model at the size that most people use, then the other sizes. A cell costs trials only
where it must: where the plan for a larger budget needs no more than this one, it is the plan for
this one too, and `apply` finds it; below a budget that nothing fits nothing is tried. What was
tried for a budget is known to the next smaller one of the same model and size, also to a later run,
and what won at one size is tried early at the next. The cells of one model share a worker, as in
`record_trials.py`, and the lines are as there. What DIR has already is not planned again: the same
command goes on from there. No cell is begun that should not be done by the deadline.
`make_profiles.py` ships what comes of it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pynvml
from make_profiles import GOLDEN, as_profile, attempt_of
from record_trials import Case, append, record, run_dry

from autofit import session
from autofit.foresight import Foresight
from autofit.planner import Planned
from autofit.spec import Profile
from autofit.trial import Measurer
from autofit.units import format_bytes, parse_size

BUDGETS = ("24GiB", "16GiB", "12GiB", "8GiB", "6GiB", "4GiB")  # the largest first

Line = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Sizes by how many people use them, and the steps of an image."""

    name: str
    steps: int
    sizes: tuple[str, ...]
    budgets: tuple[str, ...] = BUDGETS

    def columns(self) -> list[list[Case]]:
        """The cells of each size, the largest budget first. ``3840x2160@20`` takes 20 steps."""
        split = (size.partition("@") for size in self.sizes)
        works = [(size, int(steps or self.steps)) for size, _, steps in split]
        return [[Case(self.name, b, size, steps) for b in self.budgets] for size, steps in works]


MODELS = (
    Model("sdxl", 30, ("1024x1024", "1536x1024", "768x768", "3840x2160")),
    Model("sd15", 50, ("512x512", "768x768", "1024x1024", "1536x1024", "3840x2160@20")),
    Model("flux-dev", 28, ("1024x1024", "1536x1024", "768x768", "512x512")),
    Model("sd35-medium", 40, ("1024x1024", "1536x1024", "768x768", "512x512")),
    # It makes any other size at one of these, by its aspect ratio, and resizes the image.
    Model("pixart-sigma", 20, ("1024x1024", "1536x1024")),
)
TINY = (Model("tiny-sd", 2, ("64x64", "128x64"), ("1GiB", "60MiB", "6MiB", "2MiB", "1MiB")),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--only", default="", help="names of models, in the order to plan them")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of search a cell")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds to be done in")
    parser.add_argument("--device", default=session.default_device())
    options = parser.parse_args()
    known = {model.name: model for model in MODELS + TINY}
    wanted = [name for name in options.only.split(",") if name] or [m.name for m in MODELS]
    if unknown := set(wanted) - set(known):
        parser.error(f"no model {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    end = time.monotonic() + options.deadline
    path = options.out / "results.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    begun = golden(options.device) + list(map(json.loads, lines))
    matrix = Matrix(options.device, options.limit, end, begun)
    with path.open("a", encoding="utf-8") as out:
        for line in matrix.planned(in_order([known[name] for name in wanted])):
            append(line, out)


def golden(device: str) -> list[Line]:
    """The cells that were searched for longer, on a card of this name."""
    if not device.startswith("cuda"):
        return []
    pynvml.nvmlInit()  # torch would take memory of the card to tell
    name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(int(device[5:] or 0)))
    read = map(golden_line, sorted((GOLDEN / "trials").glob("*.json.gz")))
    return [line for line in read if line["found"]["device"]["name"] == name]


def golden_line(path: Path) -> Line:
    data = json.loads(gzip.decompress(path.read_bytes()))
    found = {k: data[k] for k in ("profile", "trials", "pipeline", "device")}
    told = {"command": data["command"], "smallest_bytes": None, "plan_s": 0.0}
    return {"case": data["case"], "found": found} | told


def in_order(models: list[Model]) -> list[list[Case]]:
    """All sizes: first the foremost of each model, then the others model by model."""
    columns = [model.columns() for model in models]
    return [own[0] for own in columns] + [column for own in columns for column in own[1:]]


@dataclass
class Matrix:
    """Plans cells until ``end``; ``lines`` are what earlier runs made, and this one so far."""

    device: str
    limit_s: float
    end: float
    lines: list[Line]
    dry: dict[str, Foresight] = field(default_factory=dict)  # of each size that is near

    def planned(self, columns: list[list[Case]]) -> Iterator[Line]:
        """A line of each cell that has none."""
        left = [column for column in columns if not all(map(self.line, column))]
        pairs = itertools.zip_longest(left, left[1:])
        for model, group in itertools.groupby(pairs, key=lambda pair: pair[0][0].model):
            own = list(group)
            if not self.has_time(own[0][0][0]):
                return
            self.run_dry(own[0][0][0])  # beside the building
            with session.measuring(model, self.device) as measurer:
                for column, then in own:
                    yield from self.column(column, measurer, then)

    def column(
        self, column: list[Case], measurer: Measurer, then: list[Case] | None
    ) -> Iterator[Line]:
        """Plan the budgets of one size, the largest first: a line of each that is not done."""
        after, smallest_bytes = None, 0
        with tempfile.TemporaryDirectory() as folder:
            for case in column:
                line = self.line(case)
                if line is None:
                    if not self.has_time(case):
                        return
                    line, found = self.cell(case, measurer, after, smallest_bytes)
                    self.lines.append(line)
                    yield line
                    if then and line["command"]:  # its own dry run is over
                        self.run_dry(then[0])  # beside the trials of this one
                else:
                    found = recalled(line, measurer, Path(folder) / "reference.npz")
                after = found or after
                smallest_bytes = max(smallest_bytes, line["smallest_bytes"] or 0)

    def cell(
        self, case: Case, measurer: Measurer, after: Planned | None, smallest_bytes: int
    ) -> tuple[Line, Planned | None]:
        budget_bytes = parse_size(case.budget)
        if budget_bytes < smallest_bytes:
            return too_small(case, smallest_bytes), None
        if after and after.profile.measured.peak_bytes <= budget_bytes:
            return served(case, after.profile), None
        line, found = record(
            case, measurer, self.device, self.limit_s, after, self.run_dry(case),
            begin=None if after else self.won(case),
        )  # fmt: skip
        asked = f"--only {case.model} --limit {self.limit_s:g}"
        return line | {"command": f"python scripts/record_matrix.py --out DIR {asked}"}, found

    def line(self, case: Case) -> Line | None:
        """The last one of a cell."""
        return next((x for x in reversed(self.lines) if x["case"] == asdict(case)), None)

    def won(self, case: Case) -> Profile | None:
        """What was found last for this budget at another size."""
        alike = (
            line["found"]["profile"]
            for line in reversed(self.lines)
            if line["found"]
            and (line["case"]["model"], line["case"]["budget"]) == (case.model, case.budget)
        )
        return next(map(as_profile, alike), None)

    def has_time(self, case: Case) -> bool:
        """Whether a cell that takes as long as the longest of its size, or of any size of its model
        where this is the first, will be done."""
        own = [x for x in self.lines if x["case"]["model"] == case.model]
        size = [x for x in own if x["case"]["size"] == case.size]
        longest_s = max((x["plan_s"] for x in size or own), default=self.limit_s)
        return time.monotonic() + max(longest_s, self.limit_s) <= self.end

    def run_dry(self, case: Case) -> Foresight:
        """Of its size, once: in a thread, up to 40 s."""
        key = f"{case.model} {case.size}"
        if key not in self.dry:
            self.dry[key] = run_dry(case, self.device)
        return self.dry[key]


def recalled(line: Line, measurer: Measurer, image: Path) -> Planned | None:
    """What an earlier run found on such a card; its reference, whose image is lost, is run anew."""
    found = line["found"]
    if found is None or found["device"]["name"] != measurer.subject.device.name:
        return None
    attempts = tuple(map(attempt_of, found["trials"]))
    return Planned(as_profile(found["profile"]), attempts, (), measurer.subject, image)


def too_small(case: Case, smallest_bytes: int) -> Line:
    return skipped(case, f"the smallest that works is {format_bytes(smallest_bytes)}") | {
        "smallest_bytes": smallest_bytes
    }


def served(case: Case, by: Profile) -> Line:
    """The plan for more memory needs no more than this: a search would find no other."""
    budget, peak = map(format_bytes, (by.budget_bytes, by.measured.peak_bytes))
    return skipped(case, f"the plan for {budget} needs {peak} only")


def skipped(case: Case, reason: str) -> Line:
    told = {"error": f"{case.budget}: {reason}", "smallest_bytes": None, "plan_s": 0.0}
    return {"case": asdict(case), "command": None, "found": None} | told


if __name__ == "__main__":
    main()
