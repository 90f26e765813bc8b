"""Turn recorded trials into the shipped profiles, the tests' golden trials and README's tables.

    python scripts/make_profiles.py results.jsonl [more.jsonl ...]
    python scripts/make_profiles.py --check

The lines come from record_trials.py, whose cases are the golden trials, and record_matrix.py; of a
case that one card recorded more than once the last line counts. A line with a random sample is for
the tests alone. Where nothing fits, the smallest
budget that works goes to `profiles/too_small.json`. `--check` writes nothing and fails if README's
tables are not what the profiles say.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from readme import publish
from record_trials import CASES

from autofit import report, store
from autofit.spec import Profile
from autofit.units import GIB

ROOT = Path(__file__).resolve().parent.parent
PROFILES, GOLDEN, README = ROOT / "profiles", ROOT / "tests" / "golden", ROOT / "README.md"
TOO_SMALL = PROFILES / "too_small.json"
BEGIN, END = "<!-- profiles: made by scripts/make_profiles.py -->\n", "<!-- end of profiles -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for line in latest(options.results):
        write(line)
    note_too_small(options.results)
    publish(README, BEGIN, tables(), END, check=options.check)


def latest(paths: list[Path]) -> list[dict[str, Any]]:
    """The last successful line of each case and card, and the last with a sample."""
    lines = [line for line in read(paths) if line["found"] is not None]
    found = {(name(line), "sampled" in line): line for line in lines}
    return list(found.values())


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
    if line["case"] not in map(asdict, CASES):
        return
    golden = {k: line[k] for k in ("case", "command", "sampled") if k in line} | {
        k: found[k] for k in ("profile", "trials", "pipeline", "device")
    }
    folder = GOLDEN / ("sampled" if "sampled" in line else "trials")
    target = folder / f"{name(line)}.json.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(json.dumps(golden).encode(), mtime=0))


def as_profile(data: dict[str, Any]) -> Profile:
    """Read a profile's JSON by way of its file format, which checks it."""
    for measured in (data["measured"], *(rung["measured"] for rung in data.get("ladder", ()))):
        measured.update({k: math.inf for k, found in measured.items() if found == "Infinity"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.yaml"
        path.write_text(yaml.safe_dump(data), "utf-8")
        return store.load(path)


def tables() -> str:
    """The golden cases with their plans, and all sizes and budgets of each model that has more."""
    paths = sorted(PROFILES.glob("*.yaml"), key=lambda p: p.name)
    golden = {p.name.removesuffix(".json.gz") for p in (GOLDEN / "trials").glob("*.json.gz")}
    others = [path for path in paths if path.stem not in golden]
    return table([p for p in paths if p.stem in golden]) + ("\n" + matrix(others) if others else "")


def matrix(paths: list[Path]) -> str:
    """A row a model and size, a column a budget: the seconds of an image."""
    cells: dict[tuple[str, str], dict[float, str]] = {}
    too_small = json.loads(TOO_SMALL.read_text("utf-8")) if TOO_SMALL.exists() else {}
    for path in paths:
        model, on, _, works = path.stem.split("--")
        profile = store.load(path)
        row = cells.setdefault((f"{model} {works.replace('-', ', ').replace('steps', '')}", on), {})
        row[profile.budget_bytes / GIB] = f"{profile.measured.image_s:.3g} s"
        if smallest_bytes := too_small.get(f"{model}--{works}"):
            row[0.0] = f"{smallest_bytes / GIB:.2f} GiB"
    budgets = sorted({budget for row in cells.values() for budget in row if budget})
    heads = ["model, size, steps", "card", *(f"{b:g} GiB" for b in budgets), "smallest"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (what, on), row in cells.items():
        found = [row.get(b, "-") for b in budgets] + [row.get(0.0, "")]
        rows.append(f"| {' | '.join([what, on, *found])} |")
    return "\n".join(rows) + "\n"


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
