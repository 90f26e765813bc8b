"""Built-in architectures are the published shapes, and run, save and reload like real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from autofit import anatomy, host
from autofit.architectures import (
    ARCHITECTURES,
    Architecture,
    build,
    load,
    names,
    outline,
    published,
    tiny,
)
from autofit.architectures.tokenizers import clip_tokenizer, t5_tokenizer
from autofit.architectures.weights import BLOCK, _Noise
from autofit.dryrun import ghost
from autofit.probe import fingerprint
from autofit.spec import BadInput

TINY = tuple(tiny.PIPELINES)
DTYPES = ("float32", "float16", "bfloat16")
PROMPTS = ("", "a photo of a cat", "一只猫", "кошка", "قطة", "एक बिल्ली", "🐈‍⬛ 🛋️")

by_name = pytest.mark.parametrize("name", TINY)


def image(pipe: Any, prompt: str = "a photo of a cat", seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    made: np.ndarray = pipe(prompt=prompt, generator=generator, output_type="np", **size).images
    return made


def tensors(pipe: Any) -> dict[str, torch.Tensor]:
    found = {}
    for component, module in anatomy.modules(pipe).items():
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
        found |= {f"{component}.{name}": tensor for name, tensor in named}
    return found


def assert_same_tensors(left: Any, right: Any) -> None:
    ours, theirs = tensors(left), tensors(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def hollow(name: str) -> Any:
    """Buffers too are without memory: those of sd35-medium take seconds and gigabytes."""
    return ghost.builtin(name, "float32").pipe


def test_the_list_imports_no_torch() -> None:
    code = (
        "import sys, autofit.architectures;"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_architecture_has_a_pipeline() -> None:
    assert names() == (*tiny.PIPELINES, *published.PIPELINES)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_listing_is_true(architecture: Architecture) -> None:
    pipe = hollow(architecture.name)
    modules = anatomy.modules(pipe).values()
    assert sum(p.numel() for m in modules for p in m.parameters()) == architecture.parameters
    assert type(pipe).__name__ == architecture.cls
    sample = getattr(pipe, "default_sample_size", None)
    if sample is None:
        sample = anatomy.denoiser(pipe).config.sample_size
    assert sample * pipe.vae_scale_factor == architecture.width == architecture.height


# In millions, from the models' papers and cards, apart from the code above.
@pytest.mark.parametrize(
    ("name", "component", "millions"),
    [
        ("sd15", "unet", 859.5),
        ("sd15", "text_encoder", 123.1),
        ("sd15", "vae", 83.7),
        ("sdxl", "unet", 2567.5),
        ("sdxl", "text_encoder_2", 694.7),
        ("sd35-medium", "transformer", 2243.2),
        ("sd35-medium", "text_encoder_3", 4762.3),
        ("flux-dev", "transformer", 11901.4),
        ("flux-dev", "text_encoder_2", 4762.3),
        ("pixart-sigma", "transformer", 610.9),
    ],
)
def test_published_sizes(name: str, component: str, millions: float) -> None:
    module = getattr(hollow(name), component)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@by_name
@pytest.mark.parametrize("dtype", DTYPES)
def test_generates(name: str, dtype: str) -> None:
    pipe = build(name, dtype=dtype)
    cat, dog = image(pipe, "a photo of a cat"), image(pipe, "a photo of a dog")
    assert cat.shape == (1, 64, 64, 3)
    assert np.isfinite(cat).all()
    assert cat.std() > 0.05
    assert not np.array_equal(cat, dog)


@by_name
def test_half_precision_is_close_to_float32(name: str) -> None:
    reference = image(build(name))
    for dtype in ("float16", "bfloat16"):
        error = image(build(name).to(getattr(torch, dtype))) - reference
        assert -10 * np.log10(np.square(error).mean()) > 30, dtype


@by_name
def test_seed_decides_the_weights(name: str) -> None:
    assert_same_tensors(build(name, seed=1), build(name, seed=1))
    first, second = tensors(build(name, seed=1)), tensors(build(name, seed=2))
    assert any(not torch.equal(first[n], second[n]) for n in first)


@by_name
def test_is_ready_to_run(name: str) -> None:
    pipe = build(name)
    for module in anatomy.modules(pipe).values():
        assert not module.training
        assert {t.device.type for _, _, t in anatomy.tensors(module)} == {"cpu"}
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert pipe._progress_bar_config == {"disable": True}


@by_name
def test_is_shaped_like_a_real_one(name: str) -> None:
    pipe = build(name)
    denoiser = anatomy.denoiser(pipe)
    lists = [m for n, m in denoiser.named_children() if isinstance(m, nn.ModuleList)]
    assert lists
    assert all(len(blocks) > 1 for blocks in lists if blocks)
    classes = {type(m).__name__ for m in denoiser.modules()}
    assert set(denoiser._repeated_blocks) <= classes
    assert pipe.vae_scale_factor == 8
    assert (pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size) == (64, 8)
    heads = {m.inner_dim // m.heads for m in denoiser.modules() if hasattr(m, "to_q")}
    assert heads
    assert all(size % 8 == 0 for size in heads)


def test_buffers_keep_their_values() -> None:
    pipe = build("tiny-sd3")
    normal = diffusers.SD3Transformer2DModel.from_config(pipe.transformer.config)
    assert torch.equal(pipe.transformer.pos_embed.pos_embed, normal.pos_embed.pos_embed)
    (ids,) = [b for n, b in pipe.text_encoder.named_buffers() if n.endswith("position_ids")]
    assert torch.equal(ids, torch.arange(77).expand(1, -1))


def test_t5_is_as_loaded() -> None:
    encoder = build("tiny-flux", dtype="float16").text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    wide = {n for n, p in encoder.named_parameters() if p.dtype is torch.float32}
    assert len(wide) == 2
    assert all(n.endswith("wo.weight") for n in wide)


def test_rows_of_a_large_matrix_differ() -> None:
    rows = torch.empty(2 * BLOCK // 1024, 1024)
    _Noise(0, torch.float32).fill(rows, 1.0)
    assert len(rows[:, :2].unique(dim=0)) == len(rows)
    assert rows.std().item() == pytest.approx(1, abs=0.01)


@by_name
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_an_outline_has_the_fingerprint_and_no_memory(name: str, dtype: str | None) -> None:
    outlined = outline(name, dtype=dtype)
    assert all(
        parameter.is_meta
        for module in anatomy.modules(outlined).values()
        for parameter in module.parameters()
    )
    assert fingerprint(outlined) == fingerprint(build(name, dtype=dtype))


@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()])
def test_any_text_becomes_its_own_tokens(tokenizer: Any) -> None:
    found = {tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS}
    assert len(found) == len(PROMPTS)
    assert all(0 <= i < 1024 and i != tokenizer.pad_token_id for ids in found for i in ids[:-1])
    padded = tokenizer("cat", padding="max_length").input_ids
    assert (
        len(padded)
        == tokenizer.model_max_length
        == len(tokenizer("cat " * 900, truncation=True).input_ids)
    )
    assert padded[-1] == tokenizer.pad_token_id


@by_name
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)])
def test_saves_and_reloads(name: str, dtype: str, tmp_path: Path) -> None:
    pipe = build(name, dtype=dtype, seed=3)
    pipe.save_pretrained(tmp_path)
    again = load(str(tmp_path))
    assert type(again) is type(pipe)
    assert_same_tensors(pipe, again)
    # Not to the bit: where a weight lies in memory decides how the CPU sums.
    assert np.allclose(image(pipe, "一只猫"), image(again, "一只猫"), atol=0.02)


def test_folder_loads_in_another_dtype(tmp_path: Path) -> None:
    build("tiny-sd").save_pretrained(tmp_path)
    pipe = load(str(tmp_path), dtype="bfloat16")
    assert pipe.unet.dtype is pipe.text_encoder.dtype is torch.bfloat16


def test_load_knows_the_built_in_names() -> None:
    assert_same_tensors(load("tiny-sd"), build("tiny-sd"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tiny_sd", "Did you mean tiny-sd?"),
        ("nothing-near", "Built in: tiny-sd, "),
        ("./no-folder", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_unknown_model(model: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(model)
    assert model in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_build_takes_built_in_names_only() -> None:
    with pytest.raises(BadInput, match=r"'sd-xl' is not built in\. Did you mean sdxl"):
        build("sd-xl")


def test_unknown_dtype() -> None:
    with pytest.raises(BadInput, match="dtype 'int8': weights can be float32"):
        build("tiny-sd", dtype="int8")


def test_weights_that_the_host_cannot_hold_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "machine_bytes", lambda: 20 * 10**9)
    message = (
        r"'flux-dev': its weights are 31\.42 GiB, and this host has 18\.63 GiB .+: predict, by"
    )
    with pytest.raises(BadInput, match=message):
        build("flux-dev")


def test_folder_without_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is not a folder with a model_index.json"):
        load(str(tmp_path))


def test_folder_with_missing_weights(tmp_path: Path) -> None:
    build("tiny-sd").save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInput) as caught:
        load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_with_broken_weights(tmp_path: Path) -> None:
    build("tiny-sd").save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(BadInput, match="save the pipeline again"):
        load(str(tmp_path))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        BadInput, match=r"could not reach the Hub.*or a built-in: tiny-sd"
    ) as caught:
        load("no-such-org/no-such-model")
    assert "\n" not in str(caught.value)
