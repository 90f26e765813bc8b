"""Group norm with the SiLU after it: torch's kernels beside autofit's, and the limit of the memory.

    python scripts/bench_group_norm.py --out DIR

A JSON line for norms of SD 1.5's and SDXL's UNets and of their VAE, in both layouts: seconds in a
CUDA graph, as in a step, those that the host needs to launch it eagerly, and the first call's. The
limit reads images twice and writes them once at what the card copies at.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autofit.probe import memory

SHAPES = {
    "sd15 512x512": ((2, 320, 64, 64), (2, 960, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16),
                     (2, 2560, 8, 8)),
    "sd15 512x512, 32 images": ((64, 320, 64, 64), (64, 640, 32, 32)),
    "sd15 3840x2224": ((2, 320, 278, 480), (2, 640, 139, 240), (2, 1280, 70, 120)),
    "sdxl 1024x1024": ((2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32)),
    "vae 512x512": ((1, 512, 64, 64), (1, 256, 256, 256), (1, 128, 512, 512)),
    "vae 1024x1024": ((1, 512, 128, 128), (1, 128, 1024, 1024)),
}  # fmt: skip
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CALLS = 10  # in one graph


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    folder = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    folder.mkdir(parents=True, exist_ok=True)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    bytes_s = 2 * source.nbytes / seconds(source.clone)
    del source
    with (folder / "results.jsonl").open("a") as lines:
        for name, shapes in SHAPES.items():
            for shape in shapes:
                for layout, strided in LAYOUTS.items():
                    images = torch.randn(shape, device="cuda", dtype=torch.float16)
                    images = images.contiguous(memory_format=strided)
                    line = {"of": name, "shape": shape, "layout": layout, **timed(images)}
                    line["limit_s"] = 3 * images.nbytes / bytes_s
                    line |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
                    lines.write(json.dumps(line) + "\n")
                    lines.flush()
                    print(
                        f"{name:24} {shape!s:22} {layout:14}"
                        + "".join(f" {k} {line[k] * 1e6:8.1f} us" for k in line if k[-2:] == "_s")
                    )


def timed(images: torch.Tensor) -> dict[str, Any]:
    from autofit.techniques.group_norm_kernels import group_norm

    norm = nn.GroupNorm(32, images.shape[1]).to(images.device, images.dtype)
    given = images, 32, norm.weight, norm.bias, norm.eps, True
    start = time.perf_counter()
    group_norm(*given)
    torch.cuda.synchronize()
    return {
        "first_s": time.perf_counter() - start,
        "torch_s": seconds(lambda: nn.functional.silu(norm(images))),
        "autofit_s": seconds(lambda: group_norm(*given)),
        "torch_host_s": host_seconds(lambda: nn.functional.silu(norm(images))),
        "autofit_host_s": host_seconds(lambda: group_norm(*given)),
    }


def host_seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    passed_s = time.perf_counter() - start
    torch.cuda.synchronize()
    return passed_s / CALLS


def seconds(call: Callable[[], Any]) -> float:
    """Of the fastest of three replays."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    device = torch.device("cuda", torch.cuda.current_device())
    return min(memory.timed(device, graph.replay) for _ in range(3)) / CALLS


if __name__ == "__main__":
    main()
