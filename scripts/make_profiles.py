"""Turn recorded trials into the shipped profiles, the tests' golden trials and README's table.

    python scripts/make_profiles.py results.jsonl [more.jsonl ...]
    python scripts/make_profiles.py --check

The lines come from record_trials.py; of a case that one card recorded more than once the last line
counts.
`--check` writes nothing and fails if README's table is not what the profiles say.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml
from readme import publish

from autofit import report, store
from autofit.spec import Profile
from autofit.units import GIB

ROOT = Path(__file__).resolve().parent.parent
PROFILES, GOLDEN, README = ROOT / "profiles", ROOT / "tests" / "golden", ROOT / "README.md"
BEGIN, END = "<!-- profiles: made by scripts/make_profiles.py -->\n", "<!-- end of profiles -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for line in latest(options.results):
        write(line)
    publish(README, BEGIN, table(), END, check=options.check)


def latest(paths: list[Path]) -> list[dict[str, Any]]:
    """The last successful line of each case and card."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for text in path.read_text("utf-8").splitlines():
            line = json.loads(text)
            if line["found"] is not None:
                found[name(line)] = line
    return list(found.values())


def name(line: dict[str, Any]) -> str:
    case, on = line["case"], card(line["found"]["device"]["name"])
    batch = f"-b{case['batch']}" if case["batch"] > 1 else ""
    return f"{case['model']}--{on}--{case['budget']}--{case['size']}{batch}-{case['steps']}steps"


def card(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` is an H100, ``NVIDIA GeForce RTX 4090`` an RTX-4090."""
    words = re.findall(r"[A-Za-z]*\d[\w]*|RTX|GTX", device)
    return "-".join(words[: 1 + (words[0] in ("RTX", "GTX"))])


def write(line: dict[str, Any]) -> None:
    found = line["found"]
    store.save(as_profile(found["profile"]), PROFILES / f"{name(line)}.yaml")
    golden = {k: line[k] for k in ("case", "command")} | {
        k: found[k] for k in ("profile", "trials", "pipeline", "device")
    }
    target = GOLDEN / "trials" / f"{name(line)}.json.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(json.dumps(golden).encode(), mtime=0))


def as_profile(data: dict[str, Any]) -> Profile:
    """Read a profile's JSON by way of its file format, which checks it."""
    for measured in (data["measured"], *(rung["measured"] for rung in data.get("ladder", ()))):
        if measured["psnr_db"] == "Infinity":
            measured["psnr_db"] = math.inf
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.yaml"
        path.write_text(yaml.safe_dump(data), "utf-8")
        return store.load(path)


def table() -> str:
    rows = ["| model, size, steps | card | budget | image | peak | plan |", "|---|" + "---|" * 5]
    for path in sorted(PROFILES.glob("*.yaml"), key=lambda p: p.name):
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
