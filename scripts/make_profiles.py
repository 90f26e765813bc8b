"""Turn recorded trials into the shipped profiles, the tests' golden trials and README's tables.

    python scripts/make_profiles.py results.jsonl [more.jsonl ...]
    python scripts/make_profiles.py --check

The lines come from record_trials.py, whose cases are the golden trials, and record_matrix.py; of a
case that one card recorded more than once the last line counts, but a golden one is never replaced
by the matrix's, which is searched for less long. Where a plan for less memory is clearly faster
than the matrix's, it is shipped for more too, as `autofit plan` does. A line with a random sample
is for the tests alone. Where nothing fits, the smallest budget that works goes to
`profiles/too_small.json`.
`--check` writes nothing and fails if README's tables are not what the profiles say.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from readme import publish
from record_trials import CASES

from autofit import cost, report, store
from autofit.planner import Effort
from autofit.sampler import clearly_faster
from autofit.spec import Attempt, Failure, Measurement, Outcome, Phase, Plan, Profile
from autofit.techniques import KINDS
from autofit.units import GIB

ROOT = Path(__file__).resolve().parent.parent
PROFILES, GOLDEN, README = ROOT / "profiles", ROOT / "tests" / "golden", ROOT / "README.md"
OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Measurement | Failure)
TOO_SMALL = PROFILES / "too_small.json"
BEGIN, END = "<!-- profiles: made by scripts/make_profiles.py -->\n", "<!-- end of profiles -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for line in latest(options.results):
        write(line)
    if options.results:
        take_over()
    note_too_small(options.results)
    publish(README, BEGIN, tables(), END, check=options.check)


def latest(paths: list[Path]) -> list[dict[str, Any]]:
    """The last successful line of each case and card, and the last with a sample."""
    found, searched_longer = {}, golden()
    for line in read(paths):
        if line["found"] is None or (of_matrix(line) and name(line) in searched_longer):
            continue
        found[name(line), "sampled" in line] = line
    return list(found.values())


def of_matrix(line: dict[str, Any]) -> bool:
    return "record_matrix.py" in line["command"]


def read(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(text) for path in paths for text in path.read_text("utf-8").splitlines()]


def name(line: dict[str, Any]) -> str:
    case, on = line["case"], card(line["found"]["device"]["name"])
    return f"{case['model']}--{on}--{case['budget']}--{work(case)}"


def work(case: dict[str, Any]) -> str:
    batch = f"-b{case['batch']}" if case["batch"] > 1 else ""
    return f"{case['size']}{batch}-{case['steps']}steps"


def note_too_small(paths: list[Path]) -> None:
    """Keep, by model and workload, the smallest budget of those that were tried in vain."""
    known = json.loads(TOO_SMALL.read_text("utf-8")) if TOO_SMALL.exists() else {}
    new = {
        f"{line['case']['model']}--{work(line['case'])}": line["smallest_bytes"]
        for line in read(paths)
        if line.get("smallest_bytes")
    }
    if new:
        TOO_SMALL.write_text(json.dumps(known | new, indent=1, sort_keys=True) + "\n", "utf-8")


def card(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` is an H100, ``NVIDIA GeForce RTX 4090`` an RTX-4090."""
    words = re.findall(r"[A-Za-z]*\d[\w]*|RTX|GTX", device)
    return "-".join(words[: 1 + (words[0] in ("RTX", "GTX"))])


def write(line: dict[str, Any]) -> None:
    found = line["found"]
    if "sampled" not in line:
        store.save(as_profile(found["profile"]), PROFILES / f"{name(line)}.yaml")
    if of_matrix(line) or line["case"] not in map(asdict, CASES):
        return
    kept = {k: line[k] for k in ("case", "command", "sampled") if k in line} | {
        k: found[k] for k in ("profile", "trials", "pipeline", "device", "basis") if k in found
    }
    folder = GOLDEN / ("sampled" if "sampled" in line else "trials")
    target = folder / f"{name(line)}.json.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))


def take_over() -> None:
    """Where a plan for less memory is clearly faster, it is also that for more."""
    profiles, searched_longer = {path: store.load(path) for path in shipped()}, golden()
    for path, own in profiles.items():
        if path.stem in searched_longer:
            continue
        alike = [profile for other, profile in profiles.items() if row_of(other) == row_of(path)]
        leaner = [profile for profile in alike if profile.budget_bytes < own.budget_bytes]
        best = clearly_faster(own.measured, leaner, lambda p: p.measured, Effort.images)
        if best is not None:
            store.save(replace(best, budget_bytes=own.budget_bytes), path)


def as_profile(data: dict[str, Any]) -> Profile:
    """Read a profile's JSON by way of its file format, which checks it."""
    for measured in (data["measured"], *(rung["measured"] for rung in data.get("ladder", ()))):
        measured.update({k: math.inf for k, found in measured.items() if found == "Infinity"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.yaml"
        path.write_text(yaml.safe_dump(data), "utf-8")
        return store.load(path)


def attempt_of(trial: dict[str, Any]) -> Attempt:
    """Read one of a line's trials."""
    techniques = [(KINDS[t["technique"]], t) for t in trial["plan"]]
    plan = Plan(tuple(k(**{n: v for n, v in t.items() if n != "technique"}) for k, t in techniques))
    data = trial["measured"] or trial["failure"]
    infinite = {k: math.inf for k, found in data.items() if found == "Infinity"}
    return Attempt(plan, OUTCOME.validate_python(data | infinite))


def basis_of(data: dict[str, Any]) -> cost.Basis:
    """What the search of a golden case started from; nothing in those of before it was recorded."""
    return {
        (known["dtype"], Phase(known["phase"])): cost.Plain(**known["plain"])
        for known in data.get("basis", ())
    }


def tables() -> str:
    """The golden cases with their plans, and all sizes and budgets of each model that has more."""
    paths, searched_longer = shipped(), golden()
    more = {row_of(path) for path in paths if path.stem not in searched_longer}
    others = [path for path in paths if row_of(path) in more]
    first = table([path for path in paths if path.stem in searched_longer])
    return first + ("\n" + matrix(others) if others else "")


def shipped() -> list[Path]:
    return sorted(PROFILES.glob("*.yaml"), key=lambda path: path.name)


def golden() -> set[str]:
    """The names of the cases whose trials are kept."""
    return {path.name.removesuffix(".json.gz") for path in (GOLDEN / "trials").glob("*.json.gz")}


def row_of(path: Path) -> tuple[str, str, str]:
    """The model, its workload, and the card."""
    model, on, _, works = path.stem.split("--")
    return model, works, on


def matrix(paths: list[Path]) -> str:
    """A row a model and size, a column a budget: the seconds of an image. A plan is also that for
    the smaller budgets that it fits, which have no profile of their own."""
    rows: dict[tuple[str, str, str], list[Profile]] = {}
    for path in paths:
        rows.setdefault(row_of(path), []).append(store.load(path))
    smallest = json.loads(TOO_SMALL.read_text("utf-8")) if TOO_SMALL.exists() else {}
    columns = sorted({p.budget_bytes for found in rows.values() for p in found})
    heads = ["model, size, steps", "card", *(f"{b / GIB:g} GiB" for b in columns), "smallest"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (model, works, on), found in sorted(rows.items(), key=lambda row: by_size(*row[1])):
        least_bytes = smallest.get(f"{model}--{works}")
        told = f"{least_bytes / GIB:.2f} GiB" if least_bytes else ""
        what = f"{model} {works.replace('-', ', ').replace('steps', '')}"
        lines.append(f"| {' | '.join([what, on, *(cell(found, b) for b in columns), told])} |")
    return "\n".join(lines) + "\n"


def by_size(first: Profile, *_: Profile) -> tuple[str, int]:
    return first.pipeline, first.workload.width * first.workload.height


def cell(found: list[Profile], budget_bytes: int) -> str:
    """What `apply` would take: of the profiles for so much or more that fit, the nearest."""
    fit = [p for p in found if p.measured.peak_bytes <= budget_bytes <= p.budget_bytes]
    if not fit:
        return "-"
    return f"{min(fit, key=lambda p: p.budget_bytes).measured.image_s:.3g} s"


def table(paths: list[Path]) -> str:
    rows = ["| model, size, steps | card | budget | image | peak | plan |", "|---|" + "---|" * 5]
    for path in paths:
        profile = store.load(path)
        work, measured = profile.workload, profile.measured
        model = path.name.split("--")[0]
        rows.append(
            f"| {model} {work.width}x{work.height}, {work.steps}"
            f" | {card(profile.on.device)} | {profile.budget_bytes / GIB:g} GiB"
            f" | {measured.image_s:.3g} s"
            f" | {measured.peak_bytes / GIB:.2f} GiB"
            f" | {report.plan_text(profile.plan)} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
