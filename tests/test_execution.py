from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo.config
from conftest import models
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from samples import device
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from autofit.architectures import build
from autofit.probe.pipeline import facts
from autofit.spec import BadInput, Workload
from autofit.techniques.attention import SdpaKernel
from autofit.techniques.execution import (
    CACHE_VARIABLES,
    MAX_TRACES,
    RegionalCompile,
    TracedDenoiser,
)

WORKLOAD = Workload(64, 64, 4)


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def _latents(pipe: Any, prompt: str = "a cat", steps: int = 3, size: int = 64) -> torch.Tensor:
    latents: torch.Tensor = pipe(
        prompt,
        width=size,
        height=size,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return latents


@pytest.fixture(scope="module", params=models("tiny-sdxl"))
def pipe(request: pytest.FixtureRequest) -> Any:
    return build(request.param, dtype="float32")


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    trace = torch.jit.trace
    monkeypatch.setattr(torch.jit, "trace", lambda *a, **k: made.append(a) or trace(*a, **k))
    return made


def test_a_trace_gives_the_eager_output(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"prompt": "two dogs in the snow"},
        {"steps": 5},
        {"size": 128},
    ]
    expected = [_latents(pipe, **case) for case in cases]
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert not torch.allclose(expected[0], expected[2], atol=1e-2)
    made = _counted(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r".*torch\.jit")
        with TracedDenoiser().applied(pipe, "cpu"):
            traced = [_latents(pipe, **case) for case in cases]
    assert len(made) == 2  # one a size
    for got, want in zip(traced, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _pixart() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "timestep": torch.tensor([3, 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


class Holder:
    """As much of a pipe as a technique for the denoiser asks for."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


@torch.no_grad()
def test_nothing_of_masks_and_timesteps_is_frozen_into_a_trace() -> None:
    model, inputs = _pixart()
    others = [
        inputs,
        inputs | {"timestep": torch.tensor([900, 900])},
        inputs | {"encoder_attention_mask": torch.ones(2, 5)},
        inputs | {"encoder_hidden_states": torch.randn(2, 5, 16)},
    ]
    expected = [model(**case).sample for case in others]
    with TracedDenoiser().applied(Holder(model), "cpu"):
        traced = [model(**case).sample for case in others]
    for got, want in zip(traced, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not any(torch.allclose(traced[0], other, atol=1e-5) for other in traced[1:])


@torch.no_grad()
def test_the_output_has_the_class_asked_for() -> None:
    model, inputs = _pixart()
    with TracedDenoiser().applied(Holder(model), "cpu"):
        for return_dict in (True, False):
            found = type(PixArtTransformer2DModel.forward(model, **inputs, return_dict=return_dict))
            for _ in range(2):
                assert type(model(**inputs, return_dict=return_dict)) is found


@torch.no_grad()
def test_constants_that_vary_run_eagerly_in_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = _counted(monkeypatch)
    unet = build("tiny-sd").unet
    inputs = (torch.ones(1, 4, 8, 8), torch.ones(1, 7, 32))
    expected = [unet(inputs[0], step, inputs[1]).sample for step in range(6)]
    with TracedDenoiser().applied(Holder(unet), "cpu"):
        for step, want in enumerate(expected):
            torch.testing.assert_close(unet(inputs[0], step, inputs[1]).sample, want)
        told = TracedDenoiser().fallbacks(Holder(unet))
    assert len(made) == MAX_TRACES
    assert told == (
        "UNet2DConditionModel runs eagerly, not traced:"
        " its inputs vary more than the 4 traces kept",
    )
    assert [r.getMessage() for r in caplog.records] == list(told)


@torch.no_grad()
def test_what_is_traced_tells_of_no_fallback() -> None:
    model, inputs = _pixart()
    with TracedDenoiser().applied(Holder(model), "cpu"):
        model(**inputs)
        assert TracedDenoiser().fallbacks(Holder(model)) == ()
        model(**inputs, cross_attention_kwargs={"unknown": {1, 2}})  # a set has no hash
        assert TracedDenoiser().fallbacks(Holder(model)) == (
            "PixArtTransformer2DModel runs eagerly, not traced: an argument cannot be compared with"
            " that of the next call",
        )
    assert TracedDenoiser().fallbacks(Holder(model)) == ()


@torch.no_grad()
def test_a_trace_follows_the_weights() -> None:
    model, inputs = _pixart()
    with TracedDenoiser().applied(Holder(model), "cpu"):
        model(**inputs)
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.5
        traced = model(**inputs).sample
    torch.testing.assert_close(traced, model(**inputs).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_undo_drops_the_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _pixart()
    before = {m: dict(vars(m)) for m in model.modules()}
    with TracedDenoiser().applied(Holder(model), "cpu"):
        model(**inputs)
        assert any(isinstance(o, torch.jit.ScriptModule) for o in gc.get_objects())
    assert {m: dict(vars(m)) for m in model.modules()} == before
    gc.collect()
    assert not any(isinstance(o, torch.jit.ScriptModule) for o in gc.get_objects())


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_compiled_blocks_give_the_eager_output() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    pipe = build("tiny-sd", dtype="float32")
    unet: UNet2DConditionModel = pipe.unet
    before = {m: dict(vars(m)) for m in unet.modules()}
    limit = torch._dynamo.config.recompile_limit
    folders = {n: os.environ.get(n) for n in CACHE_VARIABLES}
    expected = _latents(pipe)
    with RegionalCompile().applied(pipe, "cpu"):
        compiled = [m for m in unet.modules() if "forward" in vars(m)]
        assert {type(m).__name__ for m in compiled} == {"BasicTransformerBlock"}
        got = _latents(pipe)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert {m: dict(vars(m)) for m in unet.modules()} == before
    assert not any(vars(p) for p in unet.parameters())
    assert torch._dynamo.config.recompile_limit == limit
    assert {n: os.environ.get(n) for n in CACHE_VARIABLES} == folders


COMPILE = """
import sys
import torch
from torch._dynamo.utils import counters
from autofit.techniques.execution import RegionalCompile

class Block(torch.nn.Module):
    def forward(self, x):
        return torch.sin(x) + x

class Denoiser(torch.nn.Module):
    _repeated_blocks = ["Block"]
    def __init__(self):
        super().__init__()
        self.block = Block()

class Pipe:
    unet = Denoiser()

with torch.no_grad(), RegionalCompile().applied(Pipe, "cpu"):
    Pipe.unet.block(torch.ones(64))
found = counters["inductor"] + counters["aot_autograd"]
print(found["fxgraph_cache_hit"] + found["autograd_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("own", [False, True], ids=["in the cache folder", "where the user says"])
def test_what_was_compiled_is_found_by_the_next_process(own: bool, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    environment = {n: v for n, v in os.environ.items() if n not in CACHE_VARIABLES}
    environment["AUTOFIT_HOME"] = str(home)
    if own:
        environment[CACHE_VARIABLES[0]] = str(elsewhere)
    hits = [
        int(
            subprocess.run(
                [sys.executable, "-c", COMPILE],
                env=environment,
                cwd=Path(__file__).parent.parent,
                capture_output=True,
                check=True,
            ).stdout
        )
        for _ in range(2)
    ]
    assert hits[0] == 0
    assert hits[1] > 0
    assert (home / "cache" / "inductor").is_dir() is not own
    assert elsewhere.is_dir() is own


class Attending(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Denoiser(torch.nn.Module):
    _repeated_blocks: ClassVar[list[str]] = ["Attending"]

    def __init__(self) -> None:
        super().__init__()
        self.block = Attending()

    def forward(self, x: torch.Tensor) -> Any:
        return self.block(x)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_what_was_compiled_for_one_attention_kernel_is_not_run_for_another() -> None:
    """torch looks at all that a block reads, but not at the kernel that is preferred."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    pipe, x = Holder(Denoiser()), torch.randn(1, 2, 16, 8)
    for technique in (SdpaKernel("flash"), SdpaKernel("math")):
        counters.clear()
        with torch.no_grad(), ExitStack() as undo:
            undo.enter_context(RegionalCompile().applied(pipe, "cpu"))
            undo.enter_context(technique.applied(pipe, "cpu"))
            pipe.transformer(x)
            pipe.transformer(x)
        assert counters["stats"]["unique_graphs"] == 1


class TestTheCompileCache:
    NAME = CACHE_VARIABLES[0]

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
        for name in CACHE_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        return tmp_path

    def applied(self) -> Any:
        return RegionalCompile().applied(build("tiny-sd"), "cpu")

    def test_is_the_users_until_the_undo(self, home: Path) -> None:
        before = dict(os.environ)
        with self.applied():
            assert os.environ[self.NAME] == str(home / "cache" / "inductor")
            os.environ[CACHE_VARIABLES[1]] = "as torch sets it"
        assert dict(os.environ) == before

    def test_of_the_user_stays(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(self.NAME, found := f"{home}/of/../elsewhere")
        with self.applied():
            assert os.environ[self.NAME] in (found, f"{home}/elsewhere")  # torch writes it anew
        assert os.environ[self.NAME] == found
        assert not (home / "cache").exists()

    def test_of_torch_itself_is_nobodys_choice(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It writes its default into the environment when it is imported."""
        default = default_cache_dir()
        for name, path in zip(CACHE_VARIABLES, (default, f"{default}/triton/0"), strict=True):
            monkeypatch.setenv(name, path)
        before = dict(os.environ)
        with self.applied():
            assert os.environ[self.NAME] == str(home / "cache" / "inductor")
            assert os.environ[CACHE_VARIABLES[1]] == str(home / "cache" / "inductor" / "triton")
        assert dict(os.environ) == before

    def test_of_two_pipes_ends_with_the_last(self) -> None:
        first, second = ExitStack(), ExitStack()
        first.enter_context(self.applied())
        second.enter_context(self.applied())
        first.close()
        assert self.NAME in os.environ
        second.close()
        assert self.NAME not in os.environ

    def test_that_cannot_be_made_is_torchs(self, home: Path) -> None:
        (home / "cache").write_text("a file")
        with self.applied():
            assert os.environ.get(self.NAME, default_cache_dir()) == default_cache_dir()
        assert self.NAME not in os.environ

    def test_a_plan_that_compiles_nothing_needs_none(self, home: Path) -> None:
        with TracedDenoiser().applied(build("tiny-sd"), "cpu"):
            assert self.NAME not in os.environ
        assert not (home / "cache" / "inductor").exists()


def test_the_compiled_forward_found_comes_back() -> None:
    pipe = build("tiny-sd")
    block = next(m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    block.forward = found = torch.compile(block.forward)
    with RegionalCompile().applied(pipe, "cpu"):
        assert block.forward is not found
    assert block.forward is found


def test_an_unknown_mode() -> None:
    with pytest.raises(BadInput, match="'fast'"):
        RegionalCompile("fast")


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = facts(build("tiny-sd"))
    cpu, technique = device(kind="cpu"), RegionalCompile()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert technique.why_not(pipeline, cpu, WORKLOAD) is None
    assert "triton" in (technique.why_not(pipeline, device(), WORKLOAD) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert technique.why_not(pipeline, device(), WORKLOAD) is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no g++" in (technique.why_not(pipeline, cpu, WORKLOAD) or "")
    assert "no gcc" in (technique.why_not(pipeline, device(), WORKLOAD) or "")
    bare = dataclasses.replace(pipeline, repeated_blocks=())
    assert "no repeated blocks" in (technique.why_not(bare, cpu, WORKLOAD) or "")
