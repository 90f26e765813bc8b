"""What one layer of self-attention takes by each kernel, beside what the card's units allow.

    python scripts/bench_attention.py --out DIR [--tokens 133440] [--heads 8] [--head-size 40]

By default a layer of SD 1.5 at 3840x2224, both passes of the guidance in one batch. Each kernel
runs in a process of its own with a time limit. A JSON line each under DIR, failures too.

Two units set the limits, at the clock that the card ran at meanwhile:
- tensor cores: 4 x batch x heads x tokens^2 x head size operations, MATRIX_OPS a clock and SM;
- special functions: batch x heads x tokens^2 exponentials, 16 a clock and SM (four for each of four
  sub-cores: CUDA's programming guide, throughput of instructions; the 3.9 T/s of an H100 in
  FlashAttention-3's paper, unchanged on a B200 by FlashAttention-4's).
They can work at the same time: the longer of the two is the least that a layer takes, unless some
exponentials are computed by polynomials, as FlashAttention-4 does.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from attention_kernels import KERNELS, Attend
from torch.nn import functional

# Dense products in half precision, operations a clock and SM: A100 312 TFLOP/s at 1.41 GHz,
# H100 SXM 989 at 1.83, B200 2250 at 1.85.
MATRIX_OPS = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
EXPONENTIALS = 16
SAMPLE_TOKENS = 1024  # to see that a kernel computes attention
REPEATS = 3


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "attention.jsonl").open("a", encoding="utf-8") as file:
        for name in given.only.split(",") if given.only else KERNELS:
            shape = {n: getattr(given, n) for n in ("batch", "heads", "tokens", "head_size")}
            found = {"kernel": name, **shape, "dtype": given.dtype, **in_process(name, given)}
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(described(found), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help=f"of {','.join(KERNELS)}")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--limit-s", type=float, default=90.0, help="for each kernel")
    shape = {"--batch": 2, "--heads": 8, "--tokens": 133_440, "--head-size": 40}
    for name, value in shape.items():
        parser.add_argument(name, type=int, default=value)
    return parser.parse_args()


def in_process(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What a process that runs this kernel alone found, or why it found nothing."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=run, args=(name, given, theirs))
    child.start()
    theirs.close()
    try:
        if ours.poll(given.limit_s):
            found: dict[str, Any] = ours.recv()
            return found
        return {"error": f"no answer in {given.limit_s:g} s"}
    except EOFError:
        child.join()
        return {"error": f"died with exit code {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def run(name: str, given: argparse.Namespace, answer: Connection) -> None:
    try:
        found = measured(KERNELS[name](), given)
    except Exception as error:  # other people's kernels: whatever they raise is a result
        text = (str(error).strip() or "no reason given").splitlines()[0]
        found = {"error": f"{type(error).__name__}: {text}"[:300]}
    answer.send(found)


@torch.no_grad()
def measured(attend: Attend, given: argparse.Namespace) -> dict[str, Any]:
    sample = operands(given, min(given.tokens, SAMPLE_TOKENS))
    exact = functional.scaled_dot_product_attention(*(t.double() for t in sample))
    away = attend(*sample).double() - exact
    layer = operands(given, given.tokens)
    seconds, clock_hz = timed(functools.partial(attend, *layer), torch.device(given.device))
    found = {
        "torch": str(torch.__version__),
        "layer_s": seconds,
        "tflops_s": operations(given) / min(seconds) / 1e12,
        "relative_error": float(away.norm() / exact.norm()),
        "error": None,
    }
    if clock_hz is None:
        return found
    return found | limits(given, torch.cuda.get_device_properties(given.device), clock_hz)


def operations(given: argparse.Namespace) -> int:
    return 4 * given.batch * given.heads * given.tokens**2 * given.head_size


def limits(given: argparse.Namespace, card: Any, clock_hz: int) -> dict[str, Any]:
    clocks_s = card.multi_processor_count * clock_hz
    matrix = MATRIX_OPS.get((card.major, card.minor))
    exponentials = given.batch * given.heads * given.tokens**2
    return {
        "gpu": card.name,
        "clock_hz": clock_hz,
        "matrix_limit_s": operations(given) / (matrix * clocks_s) if matrix else None,
        "exponential_limit_s": exponentials / (EXPONENTIALS * clocks_s),
    }


def operands(given: argparse.Namespace, tokens: int) -> list[torch.Tensor]:
    """As diffusers has them: (batch, heads, tokens, head size), in memory the tokens first."""
    shape = given.batch, tokens, given.heads, given.head_size
    generator = torch.Generator(given.device).manual_seed(0)
    made = functools.partial(torch.randn, shape, generator=generator, device=given.device)
    return [made().to(getattr(torch, given.dtype)).transpose(1, 2) for _ in range(3)]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[list[float], int | None]:
    """Seconds of each run, and the clock of a card while it works."""
    on_card = device.type == "cuda"
    wait = functools.partial(torch.cuda.synchronize, device) if on_card else lambda: None
    seconds = []
    for _ in range(1 + REPEATS):  # the first compiles and tunes
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    work()
    clock_hz = torch.cuda.clock_rate(device) * 1_000_000 if on_card else None
    wait()
    return seconds[1:], clock_hz


def described(found: dict[str, Any]) -> str:
    if found["error"] is not None:
        return f"{found['kernel']:<10} {found['error']}"
    text = f"{found['kernel']:<10} {min(found['layer_s']):8.4f} s {found['tflops_s']:7.1f} TFLOP/s"
    known = {n: found.get(f"{n}_limit_s") for n in ("matrix", "exponential")}
    stated = "".join(f", {n} limit {s:.4f} s" for n, s in known.items() if s is not None)
    return f"{text}, off by {found['relative_error']:.1e}{stated}"


if __name__ == "__main__":
    main()
