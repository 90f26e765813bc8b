"""autofit beside its peers: the same pipe under the same cap, a process and a JSON line for each.

    python scripts/bench_peers.py --out DIR [--only flux-dev-1024x1024-8GiB,...]
        [--contenders autofit,...] [--limit 240] [--search 60] [--deadline 360] [--plans DIR]
        [--device cpu]

A contender that fails, hangs or runs out of memory is a line too, with `error`. What has a line in
DIR/results.jsonl is not run again: call again with the same folder to go on. Per model, `floor`
runs first: the plain pipe, resident and uncapped. It gives each case's limit, and the activations
by which the peers that want a number of bytes are tuned; one that runs out of memory is tuned again
with more slack. The last case is the published ladder (`bench_ladder.py`), with autofit on top:
`--only sd15-512x512-24GiB`. `bench_fork.py` builds a model's pipe once and forks the children,
`bench_child.py` is what one does, `bench_contenders.py` what it runs, and `make_benchmarks.py`
publishes the lines.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_ladder import LADDER

from autofit import cost
from autofit.limits import limit
from autofit.spec import Phase
from autofit.units import GIB, format_bytes, parse_size

ENVIRONMENT = {
    # read by torch, and by FlexTensor, when they are imported
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "DISABLE_BEARTYPE": "1",
    # Libraries ask for CUDA while they are imported. torch asks NVML then, not the driver: a fork
    # of a process that has asked the driver cannot use CUDA.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
FLOOR = "floor"
ON_CPU = ("autofit", "autofit-numeric", "autofit-lossy", "diffusers-model-offload",
          "diffusers-resident")  # fmt: skip
CONTENDERS = (*ON_CPU, "diffusers-vae-slicing", "diffusers-group-leaf", "diffusers-group-block",
              "flextensor", "mmgp", "diffusers-mm")  # fmt: skip
TRIES = {"flextensor": 3, "mmgp": 3}  # they are told bytes: fewer, where they went over
# What a contender holds on the card at one time: it cannot run where that is over the budget.
HOLDS = {
    "diffusers-resident": ("encoder", "denoiser", "vae"),
    "diffusers-vae-slicing": ("encoder", "denoiser", "vae"),
    "diffusers-model-offload": ("denoiser",),
}
# The VAE's tile, the same for all contenders: SDXL's decodes in float32, 4.8 GiB in one piece.
TILES_PX = {"sd15": 512, "sdxl": 512}


@dataclass(frozen=True)
class Case:
    model: str
    size: str
    steps: int
    budget: str
    batch: int = 1
    dtype: str | None = None  # None: that of the published weights

    @property
    def name(self) -> str:
        batch = f"-b{self.batch}" if self.batch > 1 else ""
        dtype = f"-{self.dtype}" if self.dtype else ""
        return f"{self.model}-{self.size}{batch}{dtype}-{self.budget}"

    def asked(self, contender: str) -> dict[str, Any]:
        """What a line says of itself before anything is run; the floor has no budget."""
        given = asdict(self)
        budget_bytes = parse_size(given.pop("budget"))
        return given | {
            "asked_dtype": self.dtype,  # ``dtype`` will be what the denoiser came to be in
            "budget_bytes": None if contender == FLOOR else budget_bytes,
            "contender": contender,
        }


# The published ladder, within the memory of the card that it was published for; and one to try.
LADDERS = (Case("sd15", "512x512", 50, "24GiB"), Case("tiny-sd", "64x64", 4, "2GiB"))
CASES = (
    *(Case("flux-dev", "1024x1024", 28, f"{gib}GiB") for gib in (8, 12, 16, 24)),
    *(Case("sdxl", "1024x1024", 30, f"{gib}GiB") for gib in (4, 6, 8, 12)),
    Case("sd15", "512x512", 50, "4GiB", dtype="float16"),
    *(Case("sd15", "3840x2224", 20, f"{gib}GiB", dtype="float16") for gib in (8, 6)),
    Case("sd15", "512x512", 20, "8GiB", batch=32, dtype="float16"),
    LADDERS[0],
)
# For trying this script on the CPU; nothing fits the last one.
TINY = (
    Case("tiny-sd", "64x64", 4, "1GiB"),
    Case("tiny-flux", "64x64", 4, "1GiB"),
    Case("tiny-sd", "64x64", 4, "1MiB"),
)
ASKED = ("model", "size", "batch", "steps", "budget_bytes", "contender")
# Every line has these, null where they are not known.
KEYS = (
    "image_s", "step_s", "peak_bytes", "limit_s", "gpu", "versions", "encode_s", "decode_s",
    "setup_s", "runs_s", "stages_s", "plan", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How children are run, whatever the case."""

    device: str
    limit_s: float
    search_s: float
    plans: Path | None  # the folder of autofit's profiles: taken from there, else put there


def main() -> None:
    given = parsed()
    options = Options(given.device, given.limit, given.search, given.plans)
    start, left = time.monotonic(), []
    for folder in filter(None, (given.out, given.plans)):
        folder.mkdir(parents=True, exist_ok=True)
    lines = Lines(given.out / "results.jsonl")
    runs = [(case, name) for case in given.cases for name in contenders_of(case, given)]
    for case, contender in runs:
        if key_of(case.asked(contender)) in lines.found:
            continue
        if time.monotonic() - start > given.deadline:
            left.append(f"{case.name} {contender}")
            continue
        floor = lines.found.get(key_of(case.asked(FLOOR)), {})
        lines.append(tuned(case, contender, floor, options))
    if left:
        print(f"left, {len(left)}: {', '.join(left)}")


def parsed() -> argparse.Namespace:
    known = {case.name: case for case in CASES + TINY + LADDERS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--only", default="", help="names of cases, in the order to run them")
    parser.add_argument("--contenders", default="", help="names, in the order to run them")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a child")
    parser.add_argument("--search", type=float, default=60.0, help="seconds autofit may search")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds to start children in")
    parser.add_argument("--plans", type=Path, help="folder of autofit's profiles, to plan but once")
    parser.add_argument("--device", default="cuda:0")
    given = parser.parse_args()
    on_cpu = given.device == "cpu"
    cases = names(given.only) or [case.name for case in (TINY if on_cpu else CASES)]
    given.contenders = names(given.contenders)
    if unknown := [n for n in cases if n not in known]:
        parser.error(f"no case {', '.join(unknown)}; known: {', '.join(known)}")
    contenders = (*CONTENDERS, *LADDER)
    if unknown := [n for n in given.contenders if n not in contenders]:
        parser.error(f"no contender {', '.join(unknown)}; known: {', '.join(contenders)}")
    given.cases = [known[name] for name in cases]
    return given


def contenders_of(case: Case, given: argparse.Namespace) -> tuple[str, ...]:
    """Whom to run on a case, where no names are given: on a ladder its rungs, then autofit."""
    if given.contenders:
        return (FLOOR, *given.contenders)
    if case in LADDERS:
        return (FLOOR, *LADDER, "autofit-numeric")
    return (FLOOR, *(ON_CPU if given.device == "cpu" else CONTENDERS))


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line answers. Lines from before a dtype could be asked for have none."""
    return (line.get("asked_dtype"), *(line[k] for k in ASKED))


class Lines:
    """A results file: what it holds by case and contender, and appending to it for good."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text("utf-8") if path.exists() else ""
        self.found = {key_of(line): line for line in map(json.loads, text.splitlines())}

    def append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, allow_nan=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.found[key_of(line)] = line


def tuned(case: Case, contender: str, floor: dict[str, Any], options: Options) -> dict[str, Any]:
    """A contender's line; one that is told how much to use is told less until it stays within."""
    asked = case.asked(contender)
    told = {
        "tile_px": TILES_PX.get(case.model),
        "device": options.device,
        "search_s": options.search_s,
        "plan_file": options.plans and str(options.plans / f"{case.name}-{contender}.yaml"),
        "activation_bytes": floor.get("activation_bytes"),
    }
    reason = why_not(asked, floor)
    for attempt in range(1, 1 + TRIES.get(contender, 1)):
        print(f"== {case.name} {contender}", flush=True)
        found = {"error": reason, "out_of_memory": True}
        if reason is None:
            found = children().run(asked | told | {"attempt": attempt}, options.limit_s)
        line = dict.fromkeys(KEYS) | floor_facts(floor) | asked | found | {"attempt": attempt}
        report(line)
        if not line.get("out_of_memory") and line.get("within_budget") is not False:
            break
    return line | limits(line, floor) | {"command": command(case, contender, options)}


@functools.cache
def children() -> Any:
    """Who runs the children: first wanted where one is to be run, since it imports torch."""
    os.environ.update(ENVIRONMENT)
    from bench_fork import Children

    return Children()


def why_not(asked: dict[str, Any], floor: dict[str, Any]) -> str | None:
    """Why a contender cannot run, by the weights that it holds at one time; None if it may."""
    budget_bytes, roles = asked["budget_bytes"], HOLDS.get(asked["contender"], ())
    if not roles or "weight_bytes" not in floor:
        return None
    held_bytes = sum(floor["weight_bytes"][role] for role in roles) + floor.get("outside_bytes", 0)
    if held_bytes <= budget_bytes:
        return None
    held, budget = format_bytes(held_bytes), format_bytes(budget_bytes)
    return f"not run: its weights and CUDA's context are {held}, the budget is {budget}"


def report(line: dict[str, Any]) -> None:
    said = line["error"] or f"{line['image_s']:.3f} s {line['peak_bytes'] / GIB:.2f} GiB"
    stages = ", ".join(f"{name} {s:.1f} s" for name, s in (line["stages_s"] or {}).items())
    print("->", "; ".join(filter(None, (said, line["plan"], stages))), flush=True)


def floor_facts(floor: dict[str, Any]) -> dict[str, Any]:
    """What is known of the machine even if a child dies before it says so."""
    return {key: floor.get(key) for key in ("gpu", "versions")}


def command(case: Case, contender: str, options: Options) -> str:
    only = case.name if contender == FLOOR else f"{case.name} --contenders {contender}"
    return (
        f"python scripts/bench_peers.py --out DIR --only {only} --device {options.device}"
        f" --limit {options.limit_s:g} --search {options.search_s:g}"
    )


def limits(line: dict[str, Any], floor: dict[str, Any]) -> dict[str, Any]:
    """The least seconds an image can take on this device within the budget, eagerly.

    By ``limits.limit`` with the floor's seconds and weights, and the room beside what is not
    torch's and a step's activations.
    """
    budget_bytes = line["budget_bytes"]
    if budget_bytes is None or "activation_bytes" not in floor:
        return {"limit_s": None}
    rate, weight_bytes = floor["pinned_bytes_s"], floor["weight_bytes"]
    room_bytes = budget_bytes - floor["outside_bytes"] - floor["activation_bytes"]["step"]
    found = limit(
        {phase: floor[f"{phase}_s"] for phase in Phase},
        denoiser_bytes=weight_bytes["denoiser"],
        encoder_bytes=weight_bytes["encoder"],
        room_bytes=room_bytes,
        bus_bytes_s=rate,
    )
    inputs = {"compute_s": floor["step_s"], "streamed_bytes": found.streamed_bytes[Phase.STEP],
              "encoder_streamed_bytes": found.streamed_bytes[Phase.ENCODE],
              "room_bytes": max(0, room_bytes), "pinned_bytes_s": rate}  # fmt: skip
    parts = {f"{phase}_s": found.phase_s[phase] for phase in Phase}
    return {"limit_s": cost.image_s(found.phase_s, line["steps"]), "limit": parts | inputs}


if __name__ == "__main__":
    main()
