"""The kernels' benchmark: one that answers and those that do not are all lines."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = ("--device", "cpu", "--dtype", "float32", "--tokens", "48", "--head-size", "16")


def run(out: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    command = [sys.executable, SCRIPTS / "bench_attention.py", "--out", out, *TINY, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, check=True, timeout=120, capture_output=True, text=True)
    lines = (out / "attention.jsonl").read_text("utf-8").splitlines()
    return done.stdout, [json.loads(line) for line in lines]


def test_each_kernel_is_a_line(tmp_path: Path) -> None:
    said, (flash, cudnn) = run(tmp_path, "--only", "flash,cudnn")
    assert [len(flash["layer_s"]), flash["error"]] == [3, None]
    assert flash["relative_error"] < 1e-5
    assert [flash[n] for n in ("batch", "heads", "tokens", "head_size")] == [2, 8, 48, 16]
    assert cudnn["error"].startswith("RuntimeError: ")
    assert [line.split()[0] for line in said.splitlines()] == ["flash", "cudnn"]


def test_a_kernel_that_hangs_is_a_line(tmp_path: Path) -> None:
    _, (line,) = run(tmp_path, "--only", "flash", "--limit-s", "0.01")
    assert line["error"] == "no answer in 0.01 s"


def test_the_limits_of_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.9 T/s of exponentials and 989 of operations, by FlashAttention-3's paper."""
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = importlib.import_module("bench_attention")
    given = Namespace(batch=2, heads=8, tokens=133_440, head_size=40)
    card = SimpleNamespace(name="H100", multi_processor_count=132, major=9, minor=0)
    found = bench.limits(given, card, 1_830_000_000)
    tokens = 2 * 8 * 133_440**2
    assert tokens / found["exponential_limit_s"] == pytest.approx(3.9e12, rel=0.01)
    assert bench.operations(given) / found["matrix_limit_s"] == pytest.approx(989e12, rel=0.001)
