"""Facts without running, against what the same calls hold and do when they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pipes

from autofit.architectures import build
from autofit.dryrun import DryRun, memo
from autofit.dryrun.decode import Piece
from autofit.roofline import PhaseFacts
from autofit.spec import BadInput, Phase, Technique, Workload
from autofit.techniques import KINDS
from autofit.trial import generate
from autofit.trial.meter import Meter, tracked

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL, LARGE, MANY = (64, 64, 1), (256, 192, 2), (128, 96, 5)  # width, height, batch
HALF, BF16 = KINDS["half_precision"]("float16"), KINDS["half_precision"]("bfloat16")
MATH, TWO = KINDS["sdpa"]("math"), KINDS["two_passes"]()
SLICED = KINDS["sliced_vae"]()
PAIRS, FOURS = KINDS["sliced_vae"](2), KINDS["sliced_vae"](4)
TILED, BOTH = KINDS["tiled_vae"](64, 0.25), KINDS["tiled_vae"](64, 0.25, True)
# Of the bytes that a real run holds: tokens' masks and a schedule, which fake runs have not.
ERROR = 0.01


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads what another has found."""
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    memo.forget()
    return tmp_path / "cache" / "dryrun"


def whole(decoder: Any, latents: torch.Tensor) -> Piece:
    """All that the VAE's own ``decode`` does, under the recorder."""
    with decoder.recorder.part() as section:
        made = decoder.vae.decode(latents).sample
    return Piece(section, tuple(made.shape), made.untyped_storage().nbytes())


def workload(model: str, size: tuple[int, int, int] = SMALL) -> Workload:
    width, height, batch = size
    return Workload(width, height, 1, batch=batch, passes=1 if model == "tiny-flux" else 2)


def held_bytes(pipe: Any, asked: Workload, techniques: tuple[Technique, ...]) -> dict[Phase, int]:
    """The live tensors' highest in a true run of one step, beside the weights."""
    with ExitStack() as stack, torch.no_grad():
        for technique in techniques:
            stack.enter_context(technique.applied(pipe, "cpu"))
        tracker = stack.enter_context(tracked(pipe, CPU, None))
        weight_bytes = tracker.live_bytes
        meter = Meter(pipe, CPU, tracker)
        with meter.running():
            generate(pipe, asked, 1)
    return {p: meter.phase_bytes[p.value] - weight_bytes for p in Phase}


def assert_alike(found: Mapping[Phase, PhaseFacts], expected: Mapping[Phase, PhaseFacts]) -> None:
    """The same operations; stand-ins for tokenizers hold some hundred bytes less."""
    for phase in Phase:
        assert found[phase].operations == expected[phase].operations
        assert found[phase].tensor_bytes == pytest.approx(expected[phase].tensor_bytes, rel=ERROR)


class TestBytes:
    @pytest.mark.parametrize(
        ("size", "techniques"),
        [(SMALL, ())]
        + [(LARGE, ts) for ts in ((), (MATH,), (TWO,), (SLICED,), (TILED, MATH))]
        + [pytest.param(LARGE, (BOTH,), marks=pytest.mark.slow)],
        ids=lambda found: " + ".join(getattr(t, "label", str(t)) for t in found) or "as found",
    )
    def test_are_those_of_a_true_run(
        self, techniques: tuple[Technique, ...], size: tuple[int, int, int], model: str,
        pipes: Pipes,
    ) -> None:  # fmt: skip
        pipe, asked = pipes[model], workload(model, size)
        found = DryRun(pipe).phases(asked, techniques)
        for phase, true_bytes in held_bytes(pipe, asked, techniques).items():
            assert found[phase].tensor_bytes == pytest.approx(true_bytes, rel=ERROR), phase

    @pytest.mark.parametrize("sliced", [SLICED, PAIRS, FOURS], ids=lambda t: t.label)
    def test_of_slices_are_those_of_a_true_run(
        self, sliced: Technique, model: str, pipes: Pipes
    ) -> None:
        pipe, asked = pipes[model], workload(model, MANY)
        found = DryRun(pipe).phases(asked, [sliced])[Phase.DECODE]
        true_bytes = held_bytes(pipe, asked, (sliced,))[Phase.DECODE]
        assert found.tensor_bytes == pytest.approx(true_bytes, rel=ERROR)

    def test_halve_with_the_dtype(self, model: str, pipes: Pipes) -> None:
        whole = DryRun(pipes[model]).phases(workload(model, LARGE))
        half = DryRun(pipes[model]).phases(workload(model, LARGE), [BF16])
        for phase in (Phase.STEP, Phase.DECODE):
            share = half[phase].tensor_bytes / whole[phase].tensor_bytes
            assert share == pytest.approx(0.5, abs=0.1)
        assert {o.dtype for o in half[Phase.STEP].operations} >= {"bfloat16"}

    def test_of_what_a_pipeline_decodes_in_float32_do_not_halve(self, pipes: Pipes) -> None:
        """SDXL casts its VAE when that is float16: the cast weights are weights, all the same."""
        dry, asked = DryRun(pipes["tiny-sdxl"]), workload("tiny-sdxl", LARGE)
        whole, half = (dry.phases(asked, ts)[Phase.DECODE] for ts in ((), (HALF,)))
        assert half.tensor_bytes == pytest.approx(whole.tensor_bytes, rel=ERROR)
        assert {o.dtype for o in half.operations if o.flops} == {"float32"}

    def test_of_convolutions_include_their_layout_copies(self, pipes: Pipes) -> None:
        decode = DryRun(pipes["tiny-sd"]).phases(workload("tiny-sd", LARGE))[Phase.DECODE]
        assert decode.activation_bytes > 1.3 * decode.tensor_bytes

    def test_do_not_grow_with_tokens_squared_in_fused_attention(self, pipes: Pipes) -> None:
        asked = workload("tiny-flux", LARGE)
        fused = DryRun(pipes["tiny-flux"]).phases(asked)[Phase.STEP]
        plain = DryRun(pipes["tiny-flux"]).phases(asked, [MATH])[Phase.STEP]
        tokens = 512 + 16 * 12
        scores_bytes = 4 * 2 * 2 * tokens**2  # float32, batch, heads
        assert plain.tensor_bytes - fused.tensor_bytes > scores_bytes
        assert {o.name for o in fused.operations} > {"attention", "rms_norm"}
        assert "attention" not in {o.name for o in plain.operations}


def test_leaves_the_pipes_configuration_as_it_was() -> None:
    """With it a pipe is saved: a component that is out for the run is not out of the pipe."""
    pipe = build("tiny-sd")
    pipe.register_modules(safety_checker=pipe.vae)
    before, parts = dict(pipe.config), pipe.components
    DryRun(pipe).phases(workload("tiny-sd"))
    assert dict(pipe.config) == before
    assert before["safety_checker"] == ("diffusers", "AutoencoderKL")
    assert all(pipe.components[name] is part for name, part in parts.items())


class TestOperations:
    def test_are_counted_by_hand(self, pipes: Pipes) -> None:
        step = DryRun(pipes["tiny-flux"]).phases(workload("tiny-flux"))[Phase.STEP]
        tokens = 512 + 4 * 4
        (attention,) = (o for o in step.operations if o.name == "attention")
        assert attention.count == 4  # two double and two single blocks
        assert attention.flops == 2 * 2 * tokens**2 * 16 * 2  # two products, heads of 16
        assert attention.moved_bytes == 4 * tokens * 32 * 4  # query, key, value and result
        assert attention.head_size == 16

    def test_of_all_images_are_those_of_one_a_batch_apart(self, pipes: Pipes) -> None:
        dry = DryRun(pipes["tiny-sd"])
        whole = dry.phases(workload("tiny-sd", LARGE))[Phase.DECODE]
        sliced = dry.phases(workload("tiny-sd", LARGE), [SLICED])[Phase.DECODE]
        assert sliced.flops == whole.flops
        assert sliced.launches > whole.launches
        assert sliced.activation_bytes < 0.6 * whole.activation_bytes

    @pytest.mark.parametrize(
        "batch", [3, 4, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))]
    )
    @pytest.mark.parametrize("sliced", [PAIRS, FOURS], ids=lambda t: t.label)
    def test_of_slices_are_as_many_as_a_true_sliced_decode_runs(
        self, sliced: Technique, batch: int, pipes: Pipes, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        pipes["tiny-sd"].vae.use_slicing, asked = True, workload("tiny-sd", (64, 64, batch))
        try:
            composed = DryRun(pipes["tiny-sd"]).phases(asked, [sliced])[Phase.DECODE]
            memo.forget()
            monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "another"))
            # Untouched by the composer: all slices run, one by one, under the recorder.
            monkeypatch.setattr("autofit.dryrun.decode._Decoder.decode", whole)
            true = DryRun(pipes["tiny-sd"]).phases(asked, [sliced])[Phase.DECODE]
        finally:
            pipes["tiny-sd"].vae.use_slicing = False
        assert composed.operations == true.operations
        assert composed.tensor_bytes == pytest.approx(true.tensor_bytes, rel=ERROR)
        assert composed.activation_bytes == pytest.approx(true.activation_bytes, rel=ERROR)

    def test_of_two_passes_are_those_of_one(self, pipes: Pipes) -> None:
        dry, asked = DryRun(pipes["tiny-sd"]), workload("tiny-sd", LARGE)
        one, two = dry.phases(asked)[Phase.STEP], dry.phases(asked, [TWO])[Phase.STEP]
        assert two.flops == one.flops
        assert two.launches > 1.9 * one.launches

    @pytest.mark.parametrize("overlap", [0.25, 0.125])
    def test_of_tiles_are_as_many_as_a_true_tiled_decode_runs(
        self, overlap: float, pipes: Pipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiled, asked = KINDS["tiled_vae"](128, overlap), workload("tiny-sd", (384, 320, 1))
        composed = DryRun(pipes["tiny-sd"]).phases(asked, [tiled])[Phase.DECODE]
        memo.forget()
        monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "another"))
        # Untouched by the composer: all tiles run, one by one, under the recorder.
        monkeypatch.setattr("autofit.dryrun.decode._Decoder._images", whole)
        true = DryRun(pipes["tiny-sd"]).phases(asked, [tiled])[Phase.DECODE]
        assert composed.flops == true.flops
        assert composed.launches == true.launches
        assert composed.tensor_bytes == pytest.approx(true.tensor_bytes, rel=ERROR)


# Weights of the blocks in squares of the hidden size (attention 4, feed-forward 8), and the tokens
# that see them: not modulation, which sees one. Hidden size, passes, (squares, tokens) of each.
BY_HAND: dict[str, tuple[int, int, tuple[tuple[int, int], ...]]] = {
    "flux-dev": (3072, 1, ((19 * 12, 4096), (19 * 12, 512), (38 * 12, 4096 + 512))),
    "sd35-medium": (1536, 2, ((24 * 12 + 13 * 4, 4096), (23 * 12 + 3, 333))),  # dual attention: 13
    "pixart-sigma": (1152, 2, ((28 * 14, 4096), (28 * 2, 300))),  # and attention to the text
}


@pytest.mark.slow
@pytest.mark.parametrize("model", BY_HAND)
def test_a_published_transformer_does_two_operations_a_weight_and_token(model: str) -> None:
    hidden, passes, parts = BY_HAND[model]
    found = DryRun(model).phases(Workload(1024, 1024, 1, passes=passes))
    step, decode = found[Phase.STEP], found[Phase.DECODE]
    attention = sum(o.flops * o.count for o in step.operations if o.name == "attention")
    expected = 2 * passes * hidden**2 * sum(squares * tokens for squares, tokens in parts)
    assert step.flops - attention == pytest.approx(expected, rel=0.02)
    assert decode.flops == pytest.approx(10.47e12, rel=0.001)  # of the decoder that all share


class TestRefusals:
    def test_of_a_dtype_for_a_pipe(self, pipes: Pipes) -> None:
        with pytest.raises(BadInput, match="a pipe has its own; apply half_precision"):
            DryRun(pipes["tiny-sd"], dtype="float16")

    def test_of_a_video(self) -> None:
        with pytest.raises(BadInput, match="frames 16: dry runs are of images"):
            DryRun("tiny-sd").phases(Workload(64, 64, 1, frames=16))

    def test_of_a_pipeline_that_looks_at_values(
        self, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def looking(*args: Any, **_: Any) -> Any:
            return float(args[0].sum())

        monkeypatch.setattr(pipes["tiny-sd"].unet, "forward", looking)
        with pytest.raises(BadInput, match=r"StableDiffusionPipeline cannot be run dry .*DataDep"):
            DryRun(pipes["tiny-sd"]).phases(workload("tiny-sd"))

    def test_of_a_size_that_the_pipeline_refuses(self) -> None:
        with pytest.raises(BadInput, match="divisible by 8"):
            DryRun("tiny-sd").phases(Workload(63, 64, 1))


class TestCache:
    def test_answers_in_memory_and_on_disk(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = DryRun("tiny-sd").phases(workload("tiny-sd"), [TILED])
        assert len(list(fresh.iterdir())) == 2  # all before decoding, and the decode
        monkeypatch.setattr("autofit.dryrun.front.run_front", None)
        monkeypatch.setattr("autofit.dryrun.decode.run_decode", None)
        assert DryRun("tiny-sd").phases(workload("tiny-sd"), [TILED]) == first
        memo.forget()
        assert DryRun("tiny-sd").phases(workload("tiny-sd"), [TILED]) == first

    def test_runs_encoders_and_denoiser_once_for_all_decodes(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dry, asked = DryRun("tiny-sd"), workload("tiny-sd", LARGE)
        dry.phases(asked)
        monkeypatch.setattr("autofit.dryrun.front.run_front", None)
        for number, decode in enumerate((SLICED, TILED, BOTH), start=3):
            dry.phases(asked, [decode])
            assert len(list(fresh.iterdir())) == number

    def test_of_a_broken_file_is_made_anew(self, fresh: Path) -> None:
        first = DryRun("tiny-sd").phases(workload("tiny-sd"))
        for path in fresh.iterdir():
            path.write_text(path.read_text()[:-20])
        memo.forget()
        assert DryRun("tiny-sd").phases(workload("tiny-sd")) == first

    def test_is_not_needed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "file"))  # no folder can be made in it
        assert DryRun("tiny-sd").phases(workload("tiny-sd"))[Phase.STEP].flops > 0


TIMED = r"""
import json, re, sys, time
start = time.perf_counter()
from autofit.dryrun import DryRun
from autofit.spec import Workload
width, height, passes = map(int, sys.argv[2:])
found = DryRun(sys.argv[1]).phases(Workload(width, height, 20, passes=passes))
print(json.dumps({
    "s": time.perf_counter() - start,
    "bytes": 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]),
    "torch": "torch" in sys.modules,
    "facts": repr(found),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [("flux-dev", 1024, 1024, 1), ("sd15", 3840, 2224, 2)], ids=lambda a: a[0]
)
def test_takes_seconds_and_no_memory(asked: tuple[Any, ...], tmp_path: Path) -> None:
    def timed(home: Path, seed: str) -> dict[str, Any]:
        environment = {**os.environ, "AUTOFIT_HOME": str(home), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", TIMED, *map(str, asked)]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        answer: dict[str, Any] = json.loads(run.stdout)
        print({k: v for k, v in answer.items() if k != "facts"})
        return answer

    first, cached = timed(tmp_path, "1"), timed(tmp_path, "1")
    assert first["s"] < 30
    assert first["bytes"] < 4 * 2**30
    assert cached["s"] < 3
    assert not cached["torch"]
    assert cached["facts"] == first["facts"]
    assert timed(tmp_path / "other", "2")["facts"] == first["facts"]  # deterministic
