"""Turn recorded trials into the shipped profiles, the tests' golden trials and README's table.

    python scripts/make_profiles.py results.jsonl [more.jsonl ...]
    python scripts/make_profiles.py --check

The lines come from record_trials.py; of a case recorded more than once the last line counts.
`--check` writes nothing and fails if README's table is not what the profiles say.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

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
    text = README.read_text("utf-8")
    made = with_table(text, table())
    if options.check:
        sys.exit(
            0 if made == text else "README's table is out of date: run scripts/make_profiles.py"
        )
    README.write_text(made, "utf-8")


def latest(paths: list[Path]) -> list[dict[str, Any]]:
    """The last successful line of each case."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for text in path.read_text("utf-8").splitlines():
            line = json.loads(text)
            if line["found"] is not None:
                found[name(line["case"])] = line
    return list(found.values())


def name(case: dict[str, Any]) -> str:
    batch = f"-b{case['batch']}" if case["batch"] > 1 else ""
    return f"{case['model']}--H200--{case['budget']}--{case['size']}{batch}-{case['steps']}steps"


def write(line: dict[str, Any]) -> None:
    found = line["found"]
    store.save(as_profile(found["profile"]), PROFILES / f"{name(line['case'])}.yaml")
    golden = {k: line[k] for k in ("case", "command")} | {
        k: found[k] for k in ("profile", "trials", "pipeline", "device")
    }
    target = GOLDEN / "trials" / f"{name(line['case'])}.json.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(json.dumps(golden).encode(), mtime=0))


def as_profile(data: dict[str, Any]) -> Profile:
    """Read a profile's JSON by way of its file format, which checks it."""
    psnr = data["measured"]["psnr_db"]
    data["measured"]["psnr_db"] = float("inf") if psnr == "Infinity" else psnr
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.yaml"
        path.write_text(yaml.safe_dump(data), "utf-8")
        return store.load(path)


def table() -> str:
    rows = ["| model, size, steps | budget | image | peak | plan |", "|---|---|---|---|---|"]
    for path in sorted(PROFILES.glob("*.yaml"), key=lambda p: p.name):
        profile = store.load(path)
        work, measured = profile.workload, profile.measured
        model = path.name.split("--")[0]
        rows.append(
            f"| {model} {work.width}x{work.height}, {work.steps}"
            f" | {profile.budget_bytes / GIB:g} GiB"
            f" | {measured.image_s:.3g} s"
            f" | {measured.peak_bytes / GIB:.2f} GiB"
            f" | {report.plan_text(profile.plan)} |"
        )
    return "\n".join(rows) + "\n"


def with_table(text: str, rows: str) -> str:
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return before + BEGIN + rows + END + after


if __name__ == "__main__":
    main()
