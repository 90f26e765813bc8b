"""What half precision casts, and what it leaves."""

from __future__ import annotations

import dataclasses

import samples
import torch
from conftest import Pipes
from handmade import (
    FACTS,
    WORKLOAD,
)

from autofit.techniques.precision import HalfPrecision


def test_half_precision_halves_what_is_float32() -> None:
    mixed = dataclasses.replace(
        FACTS,
        components=(
            dataclasses.replace(FACTS.components[0], dtype="bfloat16"),
            *FACTS.components[1:],
        ),
    )
    found = HalfPrecision("float16").facts(mixed)
    assert [c.weight_bytes for c in found.components] == [100, 150, 500, 25]
    assert [c.dtype for c in found.components] == ["bfloat16", "float16", "float16", "float16"]
    assert found.denoiser.largest_leaf_bytes == 30
    assert found.denoiser.largest_block_bytes == 100 + 2 * 75
    again = HalfPrecision("bfloat16")
    assert again.why_pointless(found, samples.device(), WORKLOAD) == "no component is in float32"


def test_float16_keeps_what_the_model_keeps_in_float32(pipes: Pipes) -> None:
    pipe = pipes["tiny-flux"]
    with HalfPrecision("float16").applied(pipe, "cpu"):
        dtypes = {n: p.dtype for n, p in pipe.text_encoder_2.named_parameters()}
        assert {d for n, d in dtypes.items() if ".wo." in n} == {torch.float32}
        assert {d for n, d in dtypes.items() if ".wo." not in n} == {torch.float16}
    with HalfPrecision("bfloat16").applied(pipe, "cpu"):
        assert {p.dtype for p in pipe.text_encoder_2.parameters()} == {torch.bfloat16}
