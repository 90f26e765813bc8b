"""Merge lines of bench_peers.py into benchmarks/results.jsonl, and make README's tables of them.

    python scripts/make_benchmarks.py results.jsonl [more.jsonl ...]
    python scripts/make_benchmarks.py --check

A newer line of the same case, contender and GPU takes the older one's place. `--check` writes
nothing and fails if README's tables are not what the lines say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_ladder import LADDER
from readme import publish

from autofit.units import GIB, format_seconds

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "benchmarks" / "results.jsonl", ROOT / "README.md"
BEGIN = "<!-- benchmarks: made by scripts/make_benchmarks.py -->\n"
END = "<!-- end of benchmarks -->"
CASE = ("gpu", "model", "size", "batch", "steps", "budget_bytes")
COLUMNS = ("autofit", "autofit-numeric", "autofit-lossy", "flextensor", "mmgp", "diffusers-mm")
TOP = "autofit-numeric"  # of a ladder
STOCK = "diffusers-"  # of diffusers' own techniques the best one has a column
PACKAGES = ("torch", "diffusers", "flextensor", "mmgp", "diffusers-mm")

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    known = [RESULTS] if RESULTS.exists() else []
    lines = merged(read(path) for path in (*known, *options.results))
    if lines and not options.check:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    text = README.read_text("utf-8")
    if BEGIN not in text or END not in text:
        if lines:
            sys.exit(f"README has no place for its table: put {BEGIN.strip()} and {END} there")
        print("no benchmarks: neither lines nor a place for their table in README")
        return
    publish(README, BEGIN, tables(lines), END, check=options.check)


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def merged(files: Iterable[list[Line]]) -> list[Line]:
    """The newest line of each case, contender and GPU, the cases in order."""
    found: dict[tuple[Any, ...], Line] = {}
    for lines in files:
        for line in lines:
            found[(*case(line), line["contender"])] = line
    return [found[key] for key in sorted(found, key=lambda key: tuple(map(sortable, key)))]


def case(line: Line) -> tuple[Any, ...]:
    return (*(line[key] for key in CASE), line.get("asked_dtype") or "")


def sortable(value: str | int | None) -> tuple[int, str]:
    """Numbers by their size among themselves, None before all."""
    return (-1, "") if value is None else (value, "") if isinstance(value, int) else (0, value)


def tables(lines: list[Line]) -> str:
    """A table for each GPU, then one for each ladder; empty without lines."""
    ladders = dict.fromkeys(case(line) for line in lines if line["contender"] in LADDER)
    others = [line for line in lines if case(line) not in ladders]
    gpus = sorted({line["gpu"] for line in others if line["gpu"] and line["budget_bytes"]})
    made = [table(gpu, [line for line in others if line["gpu"] == gpu]) for gpu in gpus]
    climbed = ([line for line in lines if case(line) == key] for key in ladders if key[0])
    return "\n".join((*made, *map(ladder, climbed)))


def table(gpu: str, lines: list[Line]) -> str:
    """A row a case; the floor, which has no budget, is in the limit of its cases."""
    ran = [line for line in lines if line["budget_bytes"] is not None]
    columns = [c for c in COLUMNS if any(line["contender"] == c for line in ran)]
    heads = ("model, size, steps", "budget", "limit", *columns, "diffusers' best")
    rows = [f"{gpu}: {versions(lines)}.", "", row(heads), "|---" * len(heads) + "|"]
    for key in dict.fromkeys(map(case, ran)):
        by_name = {line["contender"]: line for line in ran if case(line) == key}
        limit_s = next((v["limit_s"] for v in by_name.values() if v["limit_s"]), None)
        _, model, size, batch, steps, budget_bytes, dtype = key
        many = f" x {batch}" if batch > 1 else ""
        cast = f", {dtype}" if dtype else ""
        rows.append(
            row(
                (
                    f"{model} {size}{many}, {steps}{cast}",
                    f"{budget_bytes / GIB:g} GiB",
                    format_seconds(limit_s) if limit_s else "",
                    *(cell(by_name.get(name)) for name in columns),
                    stock(by_name),
                )
            )
        )
    return "\n".join(rows) + "\n"


def ladder(lines: list[Line]) -> str:
    """A row a rung, from the bottom, and autofit's last."""
    by_name, (first, *_) = {line["contender"]: line for line in lines}, lines
    heads = ("rung, each with those above", "image", "times as fast", "published, TITAN RTX")
    rows = [
        f"The published ladder, {first['model']} {first['size']}, {first['steps']} steps, on"
        f" {first['gpu']}: {versions(lines)}.",
        "",
        row(heads),
        "|---" * len(heads) + "|",
        *(
            row((rung.title, *times(by_name.get(name), by_name), f"{rung.published_s:.2f} s"))
            for name, rung in LADDER.items()
        ),
        row(("autofit", *times(by_name.get(TOP), by_name), "")),
    ]
    return "\n".join(rows) + "\n"


def times(line: Line | None, by_name: dict[str, Line]) -> tuple[str, str]:
    """The seconds of an image, and how many of the lowest rung's they are."""
    lowest = by_name.get(next(iter(LADDER)))
    if line is None or line["error"] or lowest is None or lowest["error"]:
        return cell(line), ""
    return cell(line), f"{lowest['image_s'] / line['image_s']:.2f}"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def versions(lines: list[Line]) -> str:
    """The versions that the lines were made with, peers' included."""
    seen = [line["versions"] or {} for line in lines]
    found = {p: sorted({v[p] for v in seen if p in v}) for p in PACKAGES}
    return ", ".join(f"{package} {' and '.join(all_)}" for package, all_ in found.items() if all_)


def cell(line: Line | None) -> str:
    if line is None:
        return ""
    if line["error"] is not None:
        return "out of memory" if line.get("out_of_memory") else "failed"
    over = "" if line.get("within_budget", True) else ", over"
    return f"{format_seconds(line['image_s'])} ({line['peak_bytes'] / GIB:.2f} GiB{over})"


def stock(by_name: dict[str, Line]) -> str:
    """diffusers' fastest within the budget, by name; where none is, what became of them."""
    peers = [v for k, v in by_name.items() if k.startswith(STOCK) and k not in COLUMNS]
    fit = [v for v in peers if v["error"] is None and v.get("within_budget", True)]
    if fit:
        best = min(fit, key=lambda v: v["image_s"])
        return f"{cell(best)} {best['contender'].removeprefix(STOCK)}"
    return ", ".join(dict.fromkeys(map(cell, peers)))


if __name__ == "__main__":
    main()
