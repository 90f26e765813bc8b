"""The GPU table: its figures agree with each other and with the H200, and names find their rows."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from autofit.gpus import Gpu, desktop_bytes, device_for, find, gpus
from autofit.gpus.device import DTYPES, visible_bytes
from autofit.gpus.table import computed_flops_s, families
from autofit.spec import HEAD_SIZES, LAUNCH_S, BadInput
from autofit.units import GIB
from tests import samples

TRIALS = Path(__file__).parent / "golden" / "trials"
ROWS = [family | card for family in families() for card in family["cards"]]
FAMILY_KEYS = {"capability", "pcie", "fp32", "fp16", "threads", "desktop", "source", "cards"}
CARD_KEYS = {
    "slug", "name", "gib", "gb_s", "sms", "mhz", "tensor_mhz", "lanes", "ecc", "fp16",
    "fp16_tflops", "fp32_tflops", "sustained_mhz",
}  # fmt: skip
STATED = [(r["slug"], d) for r in ROWS for d in ("fp16", "fp32") if f"{d}_tflops" in r]
# Their vendor states no clock for the tensor cores, which power holds below the boost clock.
HELD_BACK = {"h100-nvl": 0.87, "h200-nvl": 0.87, "b200": 0.94}


def slugs(*chosen: str) -> list[Gpu]:
    return [find(slug) for slug in chosen]


# ---------------------------------------------------------------- the figures


@pytest.mark.parametrize(("slug", "dtype"), STATED)
def test_a_stated_rate_is_what_the_sms_and_the_clock_come_to(slug: str, dtype: str) -> None:
    row = next(r for r in ROWS if r["slug"] == slug)
    computed = computed_flops_s(row, dtype)
    share = HELD_BACK.get(slug, 1.0) if dtype == "fp16" else 1.0
    assert computed is not None
    assert row[f"{dtype}_tflops"] * 1e12 == pytest.approx(share * computed, rel=0.05)


def test_each_kind_of_sm_has_a_stated_rate() -> None:
    """So that the FLOP a clock of every family were compared above."""
    kinds = {(tuple(r["capability"]), r.get("fp16")) for r in ROWS if "fp16" in r}
    stated = {(tuple(r["capability"]), r.get("fp16")) for r in ROWS if "fp16_tflops" in r}
    assert stated == kinds


def test_rows_have_known_keys_and_a_source() -> None:
    for family in families():
        assert set(family) <= FAMILY_KEYS
        assert "NVIDIA" in family["source"]
        for card in family["cards"]:
            assert set(card) <= CARD_KEYS, card["slug"]


def test_slugs_are_unique_and_plain() -> None:
    counted = Counter(g.slug for g in gpus())
    assert max(counted.values()) == 1
    assert all(set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for slug in counted)


@pytest.mark.parametrize("gpu", gpus(), ids=lambda gpu: gpu.slug)
def test_a_card_is_plausible(gpu: Gpu) -> None:
    assert 4 <= gpu.memory_bytes / GIB <= 180
    assert 100e9 < gpu.memory_bytes_s < 8e12
    assert 0.9e9 < gpu.boost_hz < 2.8e9
    assert gpu.tensor_hz <= gpu.boost_hz
    assert (gpu.pcie, gpu.lanes) in {(p, w) for p in (3, 4, 5) for w in (8, 16)}
    assert (gpu.bf16_flops_s is None) == (gpu.capability < (8, 0) or gpu.fp16_flops_s is None)
    if gpu.fp16_flops_s is not None:
        assert 1.99 < gpu.fp16_flops_s / gpu.fp32_flops_s < 31


@pytest.mark.parametrize(
    "ladder",
    [
        ("rtx-2060-6gb", "rtx-2060-super", "rtx-2070", "rtx-2070-super", "rtx-2080", "rtx-2080-ti"),
        ("rtx-3050-6gb", "rtx-3050-8gb", "rtx-3060-12gb", "rtx-3060-ti", "rtx-3070", "rtx-3070-ti"),
        ("rtx-3080-10gb", "rtx-3080-12gb", "rtx-3080-ti", "rtx-3090", "rtx-3090-ti"),
        ("rtx-4060", "rtx-4060-ti-8gb", "rtx-4070", "rtx-4070-super", "rtx-4070-ti", "rtx-4080"),
        ("rtx-5050", "rtx-5060", "rtx-5060-ti-8gb", "rtx-5070", "rtx-5070-ti", "rtx-5090"),
        ("rtx-4050-laptop", "rtx-4060-laptop", "rtx-4070-laptop", "rtx-4080-laptop"),
        ("rtx-5050-laptop", "rtx-5060-laptop", "rtx-5070-laptop", "rtx-5080-laptop"),
        ("t4", "a10", "a100-pcie-40gb", "h100-pcie", "h100-sxm", "b200"),
    ],
    ids=lambda ladder: ladder[0],
)
def test_a_dearer_card_of_a_series_is_faster(ladder: tuple[str, ...]) -> None:
    rates = [g.fp16_flops_s for g in slugs(*ladder)]
    assert rates == sorted(rates, key=lambda rate: rate or 0)
    bandwidths = [g.memory_bytes_s for g in slugs(*ladder)]
    assert bandwidths == sorted(bandwidths)


def test_cards_with_eight_lanes() -> None:
    narrow = {g.slug for g in gpus() if g.lanes == 8 and g.desktop and "laptop" not in g.slug}
    assert narrow >= {"rtx-4060", "rtx-4060-ti-16gb", "rtx-5060", "rtx-3050-8gb"}
    assert not narrow & {"rtx-3060-12gb", "rtx-4070", "rtx-5070"}
    assert find("rtx-4060").bus_bytes_s == pytest.approx(15.75e9, rel=1e-3)


# ---------------------------------------------------------------- the device


def golden_devices() -> list[dict[str, Any]]:
    files = sorted(TRIALS.glob("*--H200--*.json.gz"))
    return [json.loads(gzip.decompress(f.read_bytes()))["device"] for f in files]


@pytest.mark.parametrize(
    ("figure", "within"),
    [
        ("total_bytes", 0.01),
        ("context_bytes", 0.12),
        ("pinned_bytes_s", 0.02),
        ("pageable_bytes_s", 0.15),
        ("memory_bytes_s", 0.03),
    ],
)
def test_the_h200_row_is_the_h200_that_was_probed(figure: str, within: float) -> None:
    found = vars(device_for("h200"))
    probed = golden_devices()
    assert probed
    for device in probed:
        assert found[figure] == pytest.approx(device[figure], rel=within)
        assert [found["name"], list(found["capability"])] == [device["name"], device["capability"]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_h200_multiplies_as_the_h200_that_was_probed(dtype: str) -> None:
    for device in golden_devices():
        rate = device_for("h200").flops_s[dtype]
        assert rate == pytest.approx(device["flops_s"][dtype], rel=0.04)


def test_the_kernels_of_the_h200_are_those_that_answered() -> None:
    for device in golden_devices():
        probed = {(k["name"], k["dtype"], k["head_size"]) for k in device["kernels"]}
        found = {(k.name, k.dtype, k.head_size) for k in device_for("h200").kernels}
        assert found == {k for k in probed if k[0] != "xformers"}


@pytest.mark.parametrize(
    ("slug", "seen_gib"),  # total capacity in torch's out-of-memory errors, as users reported them
    [
        ("rtx-2060-6gb", 5.79),
        ("gtx-1660-ti", 5.81),
        ("rtx-3060-laptop", 5.80),
        ("rtx-4060-laptop", 7.75),
        ("rtx-3080-10gb", 9.78),
        ("rtx-a4000", 15.61),
        ("a30", 23.53),
        ("rtx-4090", 23.64),
        ("rtx-6000-ada", 50_865_307_648 / GIB),
    ],
)
def test_memory_is_what_torch_sees(slug: str, seen_gib: float) -> None:
    assert visible_bytes(find(slug)) / GIB == pytest.approx(seen_gib, rel=0.03)
    assert visible_bytes(find(slug)) <= 1.001 * seen_gib * GIB  # on the safe side


def test_error_correction_takes_its_part() -> None:
    assert visible_bytes(find("l40s")) / GIB == pytest.approx(44.4, abs=0.1)


def test_a_device_says_that_it_was_not_measured() -> None:
    device = device_for("RTX 4060")
    assert "not measured" in device.versions["source"]
    assert "Ada" in device.versions["figures"]
    assert "source" not in samples.device().versions


def test_before_ampere_there_is_no_bfloat16_and_no_flash() -> None:
    device = device_for("rtx-2080-ti")
    assert set(device.flops_s) == {"float16", "float32"}
    assert device.answers("efficient", "float16", (40, 64, 160))
    assert not device.answers("efficient", "bfloat16", (64,))
    assert not any(device.answers(k, "float16", (64,)) for k in ("flash", "cudnn"))
    assert all(device.answers("math", dtype, HEAD_SIZES) for dtype in DTYPES)


def test_without_tensor_cores_there_is_no_half_precision_rate() -> None:
    assert set(device_for("gtx-1660").flops_s) == {"float32"}


def test_cudnn_takes_large_heads_on_hopper_alone() -> None:
    assert device_for("h100-sxm").answers("cudnn", "bfloat16", (256,))
    assert not device_for("rtx-4090").answers("cudnn", "bfloat16", (160,))
    assert device_for("rtx-4090").answers("flash", "bfloat16", (256,))


def test_host_memory_is_the_callers() -> None:
    assert device_for("rtx-4060", host_limit_bytes=16 * GIB).host_limit_bytes == 16 * GIB


def test_a_card_s_host_launches_as_the_h200_s() -> None:
    assert {device_for(g.slug).launch_s for g in gpus()} == {LAUNCH_S}


def test_a_desktop_takes_of_cards_that_drive_a_screen() -> None:
    assert desktop_bytes(find("rtx-4060")) > 0
    assert desktop_bytes(find("h200")) == 0


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("rtx-4060", "rtx-4060"),
        ("RTX 4060", "rtx-4060"),
        ("rtx4060", "rtx-4060"),
        ("NVIDIA GeForce RTX 4060", "rtx-4060"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx-4060-laptop"),
        ("rtx_4060 LAPTOP", "rtx-4060-laptop"),
        ("RTX 4060 Ti 16GB", "rtx-4060-ti-16gb"),
        ("GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 2080 Super with Max-Q Design", "rtx-2080-super-max-q"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q"),
        ("RTX 6000 Ada", "rtx-6000-ada"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("Tesla T4", "t4"),
        ("h200", "h200"),
    ],
)
def test_a_name_finds_its_row(name: str, slug: str) -> None:
    assert find(name).slug == slug


@pytest.mark.parametrize("gpu", gpus(), ids=lambda gpu: gpu.slug)
def test_what_torch_reports_finds_its_row(gpu: Gpu) -> None:
    assert find(gpu.name, visible_bytes(gpu)) is gpu
    assert find(gpu.slug) is gpu


def test_a_name_of_two_cards_asks_which() -> None:
    with pytest.raises(BadInput, match=r"more than one kind; write rtx-3060-8gb .+ rtx-3060-12gb"):
        find("RTX 3060")
    assert device_for("RTX 3060", memory_bytes=12 * 10**9).name == "NVIDIA GeForce RTX 3060"
    assert find("RTX 3060", 12 * 10**9).slug == "rtx-3060-12gb"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rtx-4600", "rtx-4060"),
        ("4090", "rtx-4090"),
        ("H100", "h100-sxm"),
        ("GeForce RTX 4O90", "rtx-4090"),
        ("x", "`autofit gpus` lists"),
        ("", "`autofit gpus` lists"),
        ("Radeon RX 7900 XTX", "`autofit gpus` lists"),
    ],
)
def test_an_unknown_name_is_an_error_with_near_ones(name: str, hint: str) -> None:
    with pytest.raises(BadInput, match=r"not in the table") as error:
        find(name)
    assert hint in str(error.value)
