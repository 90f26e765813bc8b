"""The facts of the tiny pipelines, counted by hand, and of this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from conftest import TINY, Pipes
from diffusers import DiffusionPipeline

from autofit import host, probe, roofline
from autofit.architectures import ARCHITECTURES, build
from autofit.dryrun.record import Fused, Recorder
from autofit.probe import device as probe_of_device
from autofit.probe import launch
from autofit.spec import LAUNCH_S, BadInput, BlockList, Pipeline, Role

ROOT = Path(__file__).parent.parent
POSITION_IDS = 77 * 8  # bytes: a CLIP text encoder's buffer of int64
# Of SD3's transformer: positions of 64x64 patches, hidden size 2 heads of 16.
POSITION_EMBEDDING = 64 * 64 * 32 * 4
BUFFER_BYTES = {
    "tiny-sd": POSITION_IDS,
    "tiny-sdxl": 2 * POSITION_IDS,
    "tiny-flux": POSITION_IDS,
    "tiny-sd3": 2 * POSITION_IDS + POSITION_EMBEDDING,
}
# class, roles, denoiser, (hidden, head sizes), (multiple, token) in px, (steps, passes), blocks
FACTS = {
    "tiny-sd": (
        "StableDiffusionPipeline", "VED", "UNet2DConditionModel",
        (32, (16, 32)), (8, 8), (50, 2), ("BasicTransformerBlock",),
    ),
    "tiny-sdxl": (
        "StableDiffusionXLPipeline", "VEED", "UNet2DConditionModel",
        (32, (16,)), (8, 8), (50, 2), ("BasicTransformerBlock",),
    ),
    "tiny-flux": (
        "FluxPipeline", "VEED", "FluxTransformer2DModel",
        (32, (16,)), (16, 16), (28, 1), ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    ),
    "tiny-sd3": (
        "StableDiffusion3Pipeline", "VEEED", "SD3Transformer2DModel",
        (32, (16,)), (16, 16), (28, 2), (),
    ),
}  # fmt: skip
INITIALS = {"V": Role.VAE, "E": Role.ENCODER, "D": Role.DENOISER}


@pytest.fixture(scope="session")
def facts(pipes: Pipes) -> dict[str, Pipeline]:
    return {name: probe.facts(pipes[name]) for name in TINY}


class TestFacts:
    def test_are_those_of_the_architecture(self, facts: dict[str, Pipeline], model: str) -> None:
        found = facts[model]
        cls, roles, denoiser, widths, pixels, calls, blocks = FACTS[model]
        assert found.cls == cls
        assert [c.role for c in found.components] == [INITIALS[i] for i in roles]
        assert found.denoiser.cls == denoiser
        assert (found.hidden_size, found.head_sizes) == widths
        assert (found.size_multiple_px, found.token_px) == pixels
        assert (found.default_steps, found.default_passes) == calls
        assert found.repeated_blocks == blocks
        assert (found.default_width, found.default_height) == (64, 64)

    def test_weights_are_four_bytes_a_parameter_and_the_buffers(
        self, facts: dict[str, Pipeline], model: str
    ) -> None:
        parameters = next(a.parameters for a in ARCHITECTURES if a.name == model)
        assert facts[model].weight_bytes == 4 * parameters + BUFFER_BYTES[model]

    def test_of_a_clip_text_encoder(self, facts: dict[str, Pipeline]) -> None:
        encoder = facts["tiny-sd"].of_role(Role.ENCODER)[0]
        attention, mlp, norms = 4 * (32 * 32 + 32), 32 * 64 + 64 + 64 * 32 + 32, 2 * 2 * 32
        parameters = 1024 * 32 + 77 * 32 + 2 * (attention + mlp + norms) + 2 * 32
        assert encoder.weight_bytes == 4 * parameters + POSITION_IDS
        assert encoder.largest_leaf_bytes == 4 * 1024 * 32  # the token embedding
        assert encoder.blocks == ()
        assert not encoder.convolutional

    def test_of_the_blocks_of_flux(self, facts: dict[str, Pipeline]) -> None:
        linear = 32 * 32 + 32
        double = 2 * (32 * 192 + 192) + 8 * linear + 4 * 16 + 2 * (32 * 128 + 128 + 128 * 32 + 32)
        single = (32 * 96 + 96) + (32 * 128 + 128) + (160 * 32 + 32) + 3 * linear + 2 * 16
        transformer = facts["tiny-flux"].denoiser
        assert transformer.blocks == (
            BlockList("transformer_blocks", 2, 4 * double, 8 * double),
            BlockList("single_transformer_blocks", 2, 4 * single, 8 * single),
        )
        outside = transformer.weight_bytes - 8 * double - 8 * single
        assert transformer.largest_block_bytes == outside + 8 * double

    def test_what_a_pipe_can_do(self, facts: dict[str, Pipeline], model: str) -> None:
        found, unet = facts[model], model in ("tiny-sd", "tiny-sdxl")
        assert found.sliceable_attention is unet
        assert found.denoiser.convolutional is unet
        assert found.denoiser.group_norms is unet
        assert found.batched_guidance is (model != "tiny-flux")
        assert (found.vae_slices, found.vae_tiles, found.vae_channels) == (True, "attributes", 16)

    def test_follow_the_dtype(self) -> None:
        found = probe.facts(build("tiny-sd", dtype="float16"))
        assert {c.dtype for c in found.components} == {"float16"}
        parameters = next(a.parameters for a in ARCHITECTURES if a.name == "tiny-sd")
        assert found.weight_bytes == 2 * parameters + POSITION_IDS

    def test_need_a_denoiser(self) -> None:
        class NoDenoiser:
            pass

        with pytest.raises(BadInput, match="NoDenoiser has no component named transformer or unet"):
            probe.facts(NoDenoiser())


FINGERPRINTS = """
import json, sys
from autofit import probe
from autofit.architectures import build
print(json.dumps({name: probe.fingerprint(build(name)) for name in sys.argv[1:]}))
"""


class TestFingerprint:
    def test_is_the_same_in_every_process(self, facts: dict[str, Pipeline]) -> None:
        other = subprocess.Popen(
            [sys.executable, "-c", FINGERPRINTS, *TINY],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "1"},  # ours is drawn
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        here = {name: found.fingerprint for name, found in facts.items()}
        assert json.loads(other.communicate(timeout=120)[0]) == here
        assert len(set(here.values())) == len(TINY)

    @pytest.fixture
    def other(self) -> Any:
        return build("tiny-sd", seed=1)

    def test_is_not_of_the_weights_values(self, other: Any, facts: dict[str, Pipeline]) -> None:
        assert probe.fingerprint(other) == facts["tiny-sd"].fingerprint

    def test_survives_saving_and_loading(
        self, other: Any, facts: dict[str, Pipeline], tmp_path: Path
    ) -> None:
        other.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert probe.fingerprint(loaded) == facts["tiny-sd"].fingerprint

    def test_is_another_with_another_dtype(self, facts: dict[str, Pipeline]) -> None:
        half = build("tiny-sd", dtype="bfloat16")
        assert probe.fingerprint(half) != facts["tiny-sd"].fingerprint

    def test_is_another_with_another_configuration(
        self, other: Any, facts: dict[str, Pipeline]
    ) -> None:
        other.vae.register_to_config(force_upcast=False)
        assert probe.fingerprint(other) != facts["tiny-sd"].fingerprint

    def test_is_another_with_an_adapter(self, other: Any, facts: dict[str, Pipeline]) -> None:
        other.unet.conv_in.lora_A = torch.nn.Linear(4, 2, bias=False)
        assert probe.fingerprint(other) != facts["tiny-sd"].fingerprint


class TestDevice:
    @pytest.fixture
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
        return tmp_path

    def test_is_measured_once_and_again_when_asked(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = probe.probe_device("cpu")
        measured: list[torch.device] = []
        again = probe_of_device._measure

        def counted(device: torch.device, before_bytes: int | None) -> Any:
            measured.append(device)
            return again(device, before_bytes)

        monkeypatch.setattr(probe_of_device, "_measure", counted)
        assert probe.probe_device("cpu") == first
        assert measured == []
        assert probe.probe_device("cpu", fresh=True).name == first.name
        assert measured == [torch.device("cpu")]
        (cache,) = (home / "cache" / "devices").iterdir()
        cache.write_text('{"kind": "cpu"}')  # as an older version might have written it
        assert probe.probe_device("cpu").versions == first.versions
        assert len(measured) == 2
        cache.unlink()
        cache.mkdir()  # whatever is there, and whatever becomes of what is written
        assert probe.probe_device("cpu").versions == first.versions
        assert list((home / "cache" / "devices").iterdir()) == [cache]

    def test_without_what_an_older_autofit_did_not_measure_reads(self, home: Path) -> None:
        found = probe.probe_device("cpu")
        (cache,) = (home / "cache" / "devices").iterdir()
        known = json.loads(cache.read_text())
        assert known.pop("launch_s") == found.launch_s
        older = probe_of_device._DEVICE.validate_json(json.dumps(known))
        assert older == dataclasses.replace(found, launch_s=LAUNCH_S)

    def test_the_host_s_limit_is_read_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = probe.probe_device("cpu")
        monkeypatch.setattr(host, "machine_bytes", lambda: 10**9)
        found = probe.probe_device("cpu")
        assert found == dataclasses.replace(known, host_limit_bytes=10**9)

    def test_what_is_granted_is_no_fact_of_the_machine(self) -> None:
        with host.granted(10**9):
            found = probe.probe_device("cpu", fresh=True)
        assert found.total_bytes == found.host_limit_bytes == host.machine_bytes()

    def test_of_this_machine(self) -> None:
        found = probe.probe_device("cpu")
        assert (found.kind, found.capability, found.context_bytes) == ("cpu", None, 0)
        assert found.total_bytes == found.host_limit_bytes == host.limit_bytes()
        assert set(found.flops_s) == {"float16", "bfloat16", "float32"}
        assert min(found.memory_bytes_s, *found.flops_s.values()) > 0
        assert 1e-6 < found.launch_s < 0.1
        assert found.answers("math", "float32", (16, 32))
        assert not found.answers("cudnn", "float16", (64,))
        assert {"torch", "diffusers", "transformers", "accelerate"} <= set(found.versions)

    def test_a_launch_leaves_torch_s_threads(self) -> None:
        threads = torch.get_num_threads()
        assert launch.launch_s(torch.device("cpu")) > 0
        assert torch.get_num_threads() == threads

    def test_launches_are_counted_as_the_roofline_counts(self) -> None:
        blocks, recorder = launch._Blocks().eval(), Recorder()
        x = torch.randn(1, launch.TOKENS, launch.WIDTH)
        with torch.no_grad(), recorder, Fused(recorder):
            blocks(x, x)
        calls = roofline.calls(recorder.section.facts(0))
        assert calls == pytest.approx(launch.BLOCKS * launch.CALLS)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("tpu", "'tpu': not a device; write cuda:0 or cpu"),
            ("cuda:banana", "not a device"),
            ("meta", "autofit plans for cuda and cpu"),
            ("cuda:99", "torch sees \\d+ CUDA devices here; --device cpu works"),
        ],
    )
    def test_that_is_not_there(self, name: str, message: str) -> None:
        with pytest.raises(BadInput, match=message):
            probe.probe_device(name)


@pytest.mark.gpu
def test_a_card_is_named_without_torch() -> None:
    device = torch.device("cuda:0")
    assert probe.card_name(device) == torch.cuda.get_device_name(device)


def test_a_card_that_nobody_sees_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert probe.card_name(torch.device("cuda:0")) is None


def test_sage_answers_for_the_heads_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 asserts what it takes, and writes into the keys."""

    def sageattn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str) -> Any:
        assert q.shape[-1] in (64, 96, 128)
        assert tensor_layout == "NHD"
        k -= k.mean(dim=1, keepdim=True)
        return q

    monkeypatch.setitem(sys.modules, "sageattention", None)
    assert probe_of_device._sage_attempt() is None
    package = SimpleNamespace(sageattn=sageattn)
    monkeypatch.setitem(sys.modules, "sageattention", package)
    attempt = probe_of_device._sage_attempt()
    assert attempt is not None
    query = torch.ones(1, 64, 2, 64)
    assert torch.equal(attempt(query), torch.ones(1, 64, 2, 64))
    cpu = torch.device("cpu")
    answers = [probe_of_device._works(attempt, cpu, torch.float16, s) for s in (40, 64, 160)]
    assert answers == [False, True, False]
