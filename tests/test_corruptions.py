"""Ways for an image to go wrong without an error: each is staged, and refused by its trial."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from conftest import Pipes

from autofit import store, trust
from autofit.architectures import build
from autofit.spec import BadInput, Failure, Measurement, Outcome, Plan, Why, Workload
from autofit.streaming.lanes import HostLane
from autofit.techniques import KINDS
from autofit.trial import InProcess, Request

RESIDENT = Plan((KINDS["resident"](),))
WORKLOAD = Workload(128, 64, 3, passes=2)


def half(dtype: str) -> Plan:
    return Plan((KINDS["half_precision"](dtype), KINDS["resident"]()))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The file of the reference's image."""
    return tmp_path / "reference.npz"


def measured(pipe: Any, plan: Plan, image: Path) -> Outcome:
    """By the trial that a search would make: the plain pipe's image is the reference."""
    measurer = InProcess(pipe, "cpu")
    if not image.exists():
        assert isinstance(
            measurer.measure(Request(RESIDENT, WORKLOAD, None, output=image)), Measurement
        )
    return measurer.measure(Request(plan, WORKLOAD, None, reference=image))


def assert_refused(outcome: Outcome, words: str) -> None:
    assert isinstance(outcome, Failure)
    assert outcome.why is Why.BAD_OUTPUT
    assert words in outcome.detail


def test_a_vae_that_overflows_in_float16(image: Path) -> None:
    """SDXL's first one does: activations above 65,504, and a black image. In bfloat16 it works."""
    pipe = build("tiny-sd")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e5)
    assert_refused(measured(pipe, half("float16"), image), "not finite, or one flat colour")
    assert isinstance(measured(pipe, half("bfloat16"), image), Measurement)


def test_tiles_that_change_the_colours(
    image: Path, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each is normalised by itself: no seam, and another image."""
    pipe = pipes["tiny-sd"]
    tiled = Plan((KINDS["tiled_vae"](64, 0.25), KINDS["resident"]()))
    assert isinstance(measured(pipe, tiled, image), Measurement)
    found = pipe.vae.decoder.forward
    tinted = torch.tensor([0.6, 0.0, -0.6]).view(1, 3, 1, 1)
    monkeypatch.setitem(vars(pipe.vae.decoder), "forward", lambda *a, **k: found(*a, **k) + tinted)
    assert_refused(measured(pipe, tiled, image), "plans come within")


def test_group_offload_to_disk_is_in_no_plan(tmp_path: Path) -> None:
    """With a stream, leaf by leaf, diffusers' may give wrong images without an error; weights in
    files are ``streamed(from_files)``, whose images are compared in ``test_streaming.py``."""
    plan, path = Plan((KINDS["group_offload"]("leaf", stream=True),)), tmp_path / "profile.yaml"
    store.save(samples.profile(plan=plan), path)
    assert store.load(path).plan == plan
    text = path.read_text("utf-8")
    disk = "\\g<0>\n\\g<1>offload_to_disk_path: /tmp"
    text, count = re.subn(r"^( +)level: leaf", disk, text, flags=re.MULTILINE)
    assert count == 1
    path.write_text(text, "utf-8")
    with pytest.raises(BadInput, match="offload_to_disk_path"):
        store.load(path)


STREAMED = Plan((KINDS["streamed"](unit_bytes=2**15),))


@pytest.fixture
def late_copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes copies not wait for the kernels before them: one arrives as another's bytes."""
    copy, number = HostLane.copy, 0

    def late(self: HostLane, places: Any, sources: Any, *events: Any) -> None:
        nonlocal number
        number += 1
        copy(self, places, sources, *events)
        if number % 7 == 0:
            for place in places:
                place.copy_(place.roll(place.numel() // 8 * 4))

    return lambda: monkeypatch.setattr(HostLane, "copy", late)


def test_weights_that_are_written_over_while_they_are_used(
    image: Path, pipes: Pipes, late_copies: Callable[[], None]
) -> None:
    pipe = pipes["tiny-sd"]
    assert isinstance(measured(pipe, STREAMED, image), Measurement)
    late_copies()
    assert_refused(measured(pipe, STREAMED, image), "exact plans come within 45 dB")


def test_a_plan_of_a_profile_that_is_verified(
    pipes: Pipes, late_copies: Callable[[], None]
) -> None:
    """It was measured elsewhere: what it makes here is compared with what another plan does."""
    measurer = InProcess(pipes["tiny-sd"], "cpu")
    profile = samples.profile(plan=STREAMED)
    outcome = trust.tried(measurer, profile, WORKLOAD, 10**9)
    assert isinstance(outcome, Measurement)
    assert (outcome.psnr_db, outcome.reference) == (math.inf, "resident")
    late_copies()
    outcome = trust.tried(measurer, profile, WORKLOAD, 10**9)
    assert_refused(outcome, "of resident; exact plans come within 45 dB")
