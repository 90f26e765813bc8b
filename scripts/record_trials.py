"""Plan the published cases on this machine's GPU and record every trial, a JSON line a case.

    python scripts/record_trials.py --out DIR [--only sdxl-8GiB,flux-dev-8GiB] [--limit 120]

Each case is one `autofit plan` in a process of its own with a time limit; the lines are written as
they come. Budgets below the card are emulated by capping the allocator. `make_profiles.py` turns
the lines into `profiles/` and the golden trials of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    model: str
    budget: str
    size: str
    steps: int
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}-{self.size}-{self.budget}"


CASES = (
    Case("sd15", "4GiB", "512x512", 50),
    Case("sdxl", "12GiB", "1024x1024", 30),
    Case("sdxl", "8GiB", "1024x1024", 30),
    Case("sdxl", "6GiB", "1024x1024", 30),
    Case("sdxl", "4GiB", "1024x1024", 30),
    Case("sd15", "8GiB", "3840x2224", 20),
    Case("flux-dev", "24GiB", "1024x1024", 28),
    Case("flux-dev", "8GiB", "1024x1024", 28),
)
TINY = (Case("tiny-sd", "1GiB", "64x64", 4), Case("tiny-flux", "1GiB", "64x64", 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--only", default="", help="names of cases, with commas; all if empty")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of search a case")
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    wanted = {name for name in options.only.split(",") if name}
    cases = [c for c in CASES + TINY if c.name in wanted or (not wanted and c in CASES)]
    if unknown := wanted - {c.name for c in cases}:
        parser.error(
            f"no case {', '.join(sorted(unknown))}; known: {', '.join(c.name for c in CASES)}"
        )
    with (options.out / "results.jsonl").open("a") as out:
        for case in cases:
            line = record(case, options.limit, options.device)
            out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
            print(summary(case, line), flush=True)


def record(case: Case, limit_s: float, device: str) -> dict[str, object]:
    """Run one case; whatever becomes of it is a line."""
    command = [
        "autofit", "plan", case.model, "--budget", case.budget, "--size", case.size,
        "--steps", str(case.steps), "--batch", str(case.batch), "--device", device,
        "--timeout", f"{limit_s:g}s", "--json",
    ]  # fmt: skip
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            timeout=3 * limit_s + 60,
        )
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, stdout, stderr = None, "", str(error.stderr or b"", "utf-8", "replace")
    found = json.loads(stdout) if code == 0 else None
    return {
        "case": asdict(case),
        "command": " ".join(command),
        "wall_s": time.monotonic() - start,
        "exit_code": code,
        "found": found,
        "log": stderr[-6000:],
    }


def summary(case: Case, line: dict[str, object]) -> str:
    found = line["found"]
    if not isinstance(found, dict):
        return f"{case.name}: exit {line['exit_code']}\n{str(line['log'])[-2500:]}"
    profile = found["profile"]
    measured = profile["measured"]
    plan = " + ".join(json.dumps(t) for t in profile["plan"])
    return (
        f"{case.name}: {measured['image_s']:.3f} s, {measured['peak_bytes'] / 2**30:.2f} GiB,"
        f" {len(found['trials'])} trials, planned in {found['plan_s']:.0f} s: {plan}\n"
        + str(line["log"])[-3500:]
    )


if __name__ == "__main__":
    main()
