"""Fork the children of `bench_peers.py`: each begins with torch imported and the weights in memory.

The parent imports the libraries and builds a model's pipe once, in memory that forks share. It
never asks CUDA for anything and keeps no thread: neither outlives a fork.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import bench_child  # with it, all that the children need
import torch
from torch import nn

from autofit import anatomy, architectures
from autofit.units import MIB

THREADS = 8  # of a child at most, for what it computes on the CPU
POLL_S = 0.02
SAMPLE_BYTES = 4096  # of each end of a weight, to see whether somebody wrote into it

ENDED: list[bool] = []  # not empty once we are asked to end
Send = Callable[[dict[str, Any]], None]


class Children:
    """Runs specs, each in a child of its own. Keeps the pipe of one model at a time."""

    def __init__(self) -> None:
        self._threads = min(THREADS, torch.get_num_threads())
        torch.set_num_threads(1)  # with more, OpenMP would have a pool here, and hang the children
        self._key: tuple[str, str | None] | None = None
        self._pipe: Any = None
        self._checksum = 0
        # Not raised from the handler: an exception in the midst of a fork is lost, and locks stay.
        signal.signal(signal.SIGTERM, lambda *_: ENDED.append(True))

    def run(self, spec: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Run a child to its end or its limit, the building not counted."""
        self._build(spec["model"], spec["dtype"])
        assert not torch.cuda.is_initialized(), "a child of this process could not use CUDA"

        def work(send: Send) -> None:
            torch.set_num_threads(self._threads)
            bench_child.answer(self._pipe, spec, send)

        found = forked(work, limit_s)
        if checksum(self._pipe) != self._checksum:
            found["error"] = "wrote into the weights that all contenders share"
            self._drop()
        return found

    def _build(self, model: str, dtype: str | None) -> None:
        if self._key == (model, dtype):
            return
        self._drop()  # first: two may not fit
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as alone:  # OpenMP's pool ends with the thread that began it
            self._pipe = alone.submit(self._built, model, dtype).result()
        torch.set_num_threads(1)
        self._checksum, self._key = checksum(self._pipe), (model, dtype)
        print(f"== {model}: built in {time.perf_counter() - start:.1f} s", flush=True)

    def _built(self, model: str, dtype: str | None) -> Any:
        torch.set_num_threads(self._threads)
        pipe = architectures.build(model, dtype=dtype)
        share(pipe)
        return pipe

    def _drop(self) -> None:
        self._pipe = self._key = None
        gc.collect()


def share(pipe: Any) -> None:
    """Move the weights into memory that a fork shares: the pages of private memory are copied when
    a child page-locks them. Mapped without a name, it needs no file descriptor and no /dev/shm."""
    found = unique_tensors(pipe)
    memory = mmap.mmap(-1, sum(map(paged_bytes, found)) or mmap.PAGESIZE)
    at = 0
    for tensor in found:
        place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        tensor.data = place.view(tensor.shape).copy_(tensor.data)
        at += paged_bytes(tensor)


def paged_bytes(tensor: torch.Tensor) -> int:
    """A page belongs to one weight: what is page-locked twice is refused."""
    return -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def checksum(pipe: Any) -> int:
    found = 0
    for tensor in unique_tensors(pipe):
        flat = tensor.data.reshape(-1).view(torch.uint8)
        for end in (flat[:SAMPLE_BYTES], flat[-SAMPLE_BYTES:]):
            found = zlib.crc32(end.numpy(), found)
    return found


def unique_tensors(pipe: Any) -> list[torch.Tensor]:
    modules: list[nn.Module] = list(anatomy.modules(pipe).values())
    found = {id(t): t for m in modules for _, _, t in anatomy.tensors(m) if t.numel()}
    return list(found.values())


def forked(work: Callable[[Send], None], limit_s: float) -> dict[str, Any]:
    """Run the work in a fork, to its end or its limit: all that it sent, the later over the
    earlier, and ``error``, None where there was none."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.jsonl", Path(folder) / "log"
        log.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _child(work, answer, log)
        ended = waited(child, limit_s)
        found = answers(answer)
        if "error" not in found:
            found["error"] = f"{ended}; {last_words(log, 1)}"[:400]
        if found["error"]:
            print(last_words(log, 30), flush=True)
        return found


def _child(work: Callable[[Send], None], answer: Path, log: Path) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)  # with the compilers that it may start
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor, target in ((0, Path(os.devnull)), (1, log), (2, log)):
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_APPEND
            os.dup2(os.open(target, flags), descriptor)
        with answer.open("a", encoding="utf-8") as out:

            def send(found: dict[str, Any]) -> None:
                out.write(json.dumps(found, allow_nan=False) + "\n")
                out.flush()

            try:
                work(send)
            except Exception as error:  # other people's code: whatever it raises is a result
                traceback.print_exc()
                send(failed(error))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # tens of GiB of hooks and pinned memory need not be undone one by one


def failed(error: Exception) -> dict[str, Any]:
    text = (str(error).strip() or "no reason given").splitlines()[0]
    full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
    return {"error": f"{type(error).__name__}: {text}"[:300], "out_of_memory": full}


def waited(child: int, limit_s: float) -> str:
    """How the child ended; nothing of its process group is left."""
    deadline, ended, status = time.monotonic() + limit_s, 0, 0
    try:
        while not ended and time.monotonic() < deadline:
            if ENDED:
                sys.exit(128 + signal.SIGTERM)
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                time.sleep(POLL_S)
    finally:
        with suppress(ProcessLookupError):  # it left nobody, or has no group yet
            os.killpg(child, signal.SIGKILL)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not ended:
        return f"no answer in {limit_s:g} s: killed"
    code = os.waitstatus_to_exitcode(status)
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def answers(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in path.read_text("utf-8").splitlines(keepends=True) if path.exists() else ():
        if text.endswith("\n"):  # else killed while it wrote
            found |= json.loads(text)
    return found


def last_words(log: Path, count: int) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - MIB // 16))
        return "\n".join(file.read().decode(errors="replace").strip().splitlines()[-count:])
