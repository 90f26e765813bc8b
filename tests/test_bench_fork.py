"""The children of the benchmark: forked over shared weights, ended by themselves or by us."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
Send = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def fork() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("bench_fork")


def test_a_child_that_dies_leaves_what_it_said(fork: Any) -> None:
    def work(send: Send) -> None:
        send({"gpu": "G"})
        os.write(1, b"the last words")
        os.kill(os.getpid(), 9)

    assert fork.forked(work, 20.0) == {"gpu": "G", "error": "ended by SIGKILL; the last words"}
    assert fork.forked(lambda send: os._exit(3), 20.0) == {"error": "exit code 3; "}


def test_an_answer_cut_off_is_none(fork: Any, tmp_path: Path) -> None:
    answer = tmp_path / "answer.jsonl"
    assert fork.answers(answer) == {}
    answer.write_text('{"gpu": "G", "size": 1}\n{"size": 2}\n{"gpu": "cut o')
    assert fork.answers(answer) == {"gpu": "G", "size": 2}


def test_what_a_child_raises_is_its_answer(fork: Any) -> None:
    def work(send: Send) -> None:
        raise RuntimeError("CUDA out of memory. Tried\nmore")

    assert fork.forked(work, 20.0) == {
        "error": "RuntimeError: CUDA out of memory. Tried", "out_of_memory": True,
    }  # fmt: skip


def test_nothing_of_a_childs_group_is_left(fork: Any) -> None:
    def work(send: Send) -> None:
        code = "import time; time.sleep(600)"
        send({"error": None, "left": subprocess.Popen([sys.executable, "-c", code]).pid})
        time.sleep(600)

    left = fork.forked(work, 3.0)["left"]
    deadline = time.monotonic() + 10.0  # a signal takes its time
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_weights_are_built_once_and_written_by_nobody(
    fork: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child sees the parent's own memory, so the parent sees what a child writes there."""
    built: list[str] = []
    build = fork.architectures.build
    monkeypatch.setattr(
        fork.architectures, "build", lambda name, dtype: built.append(name) or build(name)
    )
    monkeypatch.setattr(fork.torch, "set_num_threads", lambda count: None)
    children, spec = fork.Children(), {"model": "tiny-flux", "dtype": None}

    def run(answer: Callable[..., None]) -> Any:
        monkeypatch.setattr(fork.bench_child, "answer", answer)
        return children.run(spec, 20.0)["error"]

    def reads(pipe: Any, spec: Any, send: Send) -> None:
        pipe.transformer.to(fork.torch.bfloat16)  # copies
        send({"error": None})

    def writes(pipe: Any, spec: Any, send: Send) -> None:
        list(pipe.transformer.parameters())[-1].data.add_(1.0)
        send({"error": None})

    assert [run(reads), run(reads)] == [None, None]
    assert built == ["tiny-flux"]
    assert "wrote into the weights" in run(writes)
    assert run(reads) is None
    assert built == ["tiny-flux"] * 2


def test_each_shared_weight_has_pages_of_its_own(fork: Any) -> None:
    pipe = fork.architectures.build("tiny-sd")
    before = [t.clone() for t in fork.unique_tensors(pipe)]
    fork.share(pipe)
    after = fork.unique_tensors(pipe)
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(after, before, strict=True))
    assert all(t.data_ptr() % fork.mmap.PAGESIZE == 0 for t in after)
    starts = {t.untyped_storage().data_ptr() for t in after}
    assert len(starts) == len(after)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in after)


def test_float16_is_cast_for_who_cannot_do_with_it(fork: Any) -> None:
    pipe = fork.architectures.build("tiny-sdxl", dtype="float16")
    kept = pipe.unet.conv_in.weight.data
    fork.bench_child.cast(pipe, "autofit")
    assert pipe.unet.conv_in.weight.data.data_ptr() == kept.data_ptr()
    fork.bench_child.cast(pipe, "mmgp")
    assert {str(p.dtype) for p in pipe.unet.parameters()} == {"torch.bfloat16"}
    assert str(kept.dtype) == "torch.float16"
