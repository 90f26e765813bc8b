"""Live with an applied plan: many generations at mixed sizes, and calls larger than planned.

    python scripts/endure.py --out DIR [--only sdxl-6GiB,...] [--calls 200] [--limit 500]

`sdxl-6GiB` is planned for one image of 1024x1024 and called again and again at sizes and batches up
to that: nothing may run out of memory, memory may not grow, and times stay. `flux-dev-12GiB` is
planned for one image and called with batches of 1 to 4: it comes down its ladder. Each case is a
process of its own with a time limit; each call is a JSON line in DIR/results.jsonl, written as it
is made, and the sum of a case its last one. `--device cpu` tries the first with a tiny model;
nothing limits the memory there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROWTH_BYTES = 64 * 2**20  # of device or host memory, after the first round of all calls
STEADY = 1.15  # the last times of a kind over its first ones


@dataclass(frozen=True)
class Call:
    width: int
    height: int
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}x{self.batch}"


@dataclass(frozen=True)
class Case:
    """``calls`` are made in turn. ``comes_down``: calls larger than planned, made once each."""

    model: str
    budget: str
    steps: int
    calls: tuple[Call, ...]
    comes_down: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.budget}"


MIXED = (Call(1024, 1024), Call(768, 1024), Call(1024, 768), Call(512, 512, 2), Call(896, 640),
         Call(640, 640, 2))  # fmt: skip
BATCHES = tuple(Call(1024, 1024, batch) for batch in (1, 2, 3, 4, 1))
CASES = (
    Case("sdxl", "6GiB", 8, MIXED),
    Case("flux-dev", "12GiB", 4, BATCHES, comes_down=True),
)
TINY = (Case("tiny-sd", "1GiB", 2, (Call(64, 64), Call(32, 64), Call(32, 32, 2))),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--only", default="", help="names of cases, in the order to run them")
    parser.add_argument("--calls", type=int, default=200, help="of a case that does not come down")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds a case")
    parser.add_argument("--search", type=float, default=40.0, help="seconds of search a case")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # run this one here
    given = parser.parse_args()
    known = {case.name: case for case in (TINY if given.device == "cpu" else CASES)}
    if given.case:
        run(known[given.case], given)
        return
    names = [name for name in given.only.split(",") if name] or list(known)
    if unknown := [n for n in names if n not in known]:
        parser.error(f"no case {', '.join(unknown)}; known: {', '.join(known)}")
    given.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not child(name, given)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def child(name: str, given: argparse.Namespace) -> bool:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    command = [sys.executable, *sys.argv, "--case", name]
    try:
        done = subprocess.run(command, timeout=given.limit, env=environment, check=False)
    except subprocess.TimeoutExpired:
        write(given.out, {"case": name, "error": f"not done within {given.limit:g} s"})
        return False
    if done.returncode < 0:
        write(given.out, {"case": name, "error": f"ended by signal {-done.returncode}"})
    return done.returncode == 0


def run(case: Case, given: argparse.Namespace) -> None:
    """One case, in this process. Exits with 1 where something did not hold."""
    import torch

    from autofit import architectures, session
    from autofit.planner import Effort

    pipe = architectures.build(case.model)
    pipe.set_progress_bar_config(disable=True)
    start, first = time.monotonic(), case.calls[0]
    effort = Effort(timeout_s=given.search, fresh=True)
    size = (first.width, first.height)
    with session.apply(
        pipe, budget=case.budget, size=size, steps=case.steps, device=given.device, effort=effort
    ) as fit:
        write(given.out, {"case": case.name, "plan": fit.plan.label, "command": command(given),
                          "gpu": gpu(torch), "torch": torch.__version__,
                          "plan_s": time.monotonic() - start})  # fmt: skip
        lines: list[dict[str, Any]] = []
        for number, call in enumerate(turns(case, given.calls)):
            line = {"case": case.name, "number": number, "call": call.name}
            line |= made(pipe, case, call, number, torch, given.device)
            line |= {"plan": fit.plan.label}
            lines.append(line)
            write(given.out, line)
        total = summed(case, lines)
    write(given.out, total)
    sys.exit(0 if total["holds"] else 1)


def turns(case: Case, count: int) -> Iterator[Call]:
    if case.comes_down:
        yield from case.calls
    else:
        for number in range(count):
            yield case.calls[number % len(case.calls)]


def made(pipe: Any, case: Case, call: Call, number: int, torch: Any, device: str) -> dict[str, Any]:
    """One call: seconds, and what it left in memory; an error is a line too."""
    on_gpu = device != "cpu"
    generator = torch.Generator().manual_seed(number)
    start = time.perf_counter()
    error = None
    try:
        pipe(f"a lighthouse at dusk, {call.name}", width=call.width, height=call.height,
             num_images_per_prompt=call.batch, num_inference_steps=case.steps, generator=generator,
             output_type="np")  # fmt: skip
    except Exception as raised:
        error = f"{type(raised).__name__}: {str(raised).splitlines()[0]}"
    taken_s = time.perf_counter() - start
    return {
        "image_s": taken_s,
        "error": error,
        "allocated_bytes": torch.cuda.memory_allocated() if on_gpu else None,
        "reserved_bytes": torch.cuda.memory_reserved() if on_gpu else None,
        "device_bytes": device_bytes(torch) if on_gpu else None,
        "host_bytes": host_bytes(),
    }


def device_bytes(torch: Any) -> int:
    """Taken of the card, by whomever: what graphs take of the driver is in no allocator's count."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return int(total_bytes - free_bytes)


def host_bytes() -> int:
    """Of this process, in memory and its own."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    return int(found[1]) * 1024 if found else 0


def summed(case: Case, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What came of all calls. Growth counts from the end of the second round: by then every size
    was seen twice, and graphs are captured."""
    plans = list(dict.fromkeys(line["plan"] for line in lines))
    errors = [line["error"] for line in lines if line["error"]]
    found: dict[str, Any] = {"case": case.name, "calls": len(lines), "errors": errors,
                             "plans": plans}  # fmt: skip
    if case.comes_down:
        return found | {"holds": not errors and len(plans) > 1}
    later = lines[2 * len(case.calls) :]
    growth = {
        key: later[-1][key] - later[0][key] if later and later[0][key] is not None else 0
        for key in ("allocated_bytes", "reserved_bytes", "device_bytes", "host_bytes")
    }
    drift = {}
    for call in case.calls:
        times = [line["image_s"] for line in later if line["call"] == call.name]
        if len(times) >= 6:
            drift[call.name] = statistics.median(times[-3:]) / statistics.median(times[:3])
    steady = max(drift.values(), default=1.0) <= STEADY
    flat = max(growth.values()) <= GROWTH_BYTES
    holds = not errors and len(plans) == 1 and flat and steady
    return found | {"growth": growth, "drift": drift, "holds": holds}


def command(given: argparse.Namespace) -> str:
    return (
        f"python scripts/endure.py --out DIR --only {given.case} --calls {given.calls}"
        f" --search {given.search:g} --device {given.device}"
    )


def gpu(torch: Any) -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def write(folder: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    with (folder / "results.jsonl").open("a", encoding="utf-8") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())


if __name__ == "__main__":
    main()
