from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import Pipes
from diffusers.hooks import apply_group_offloading
from PIL import Image
from snapshots import differences, snapshot

import autofit
from autofit import BadInput, Plan, Profile, Workload, probe, session, store
from autofit.architectures import build, load
from autofit.match import Level, environment
from autofit.planner import Effort
from autofit.spec import Measurement, Outcome, Rung
from autofit.techniques import KINDS
from autofit.trial import InProcess, Request

SHORT = Effort(trials=2)
RESIDENT = KINDS["resident"]()
CHANGED = Plan((KINDS["half_precision"]("bfloat16"), KINDS["sdpa"]("math"), RESIDENT))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of profiles of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("session")
        patch.setenv("AUTOFIT_HOME", str(path))
        yield path


def profile_for(pipe: Any, plan: Plan = CHANGED, **changes: Any) -> Profile:
    """As if measured on this machine, with these versions."""
    facts = {
        "pipeline": type(pipe).__name__,
        "fingerprint": probe.fingerprint(pipe),
        "workload": Workload(64, 64, 2, passes=2),
        "plan": plan,
        "on": environment(probe.probe_device("cpu"), 4 * samples.GIB),
    }
    return samples.profile(**(facts | changes))


def image(pipe: Any) -> np.ndarray[Any, Any]:
    return np.asarray(session.generate(pipe, Workload(64, 64, 2, passes=2), "a cat", 0)[0])


class TestPlanAndApply:
    @pytest.fixture(scope="class")
    def pipe(self, pipes: Pipes) -> Any:
        return pipes["tiny-sd"]

    @pytest.fixture(scope="class")
    def before(self, pipe: Any) -> dict[str, object]:
        return snapshot(pipe)

    @pytest.fixture(scope="class")
    def first(self, pipe: Any, before: dict[str, object]) -> Profile:
        fit = autofit.apply(pipe, budget="1GB", steps=4, device="cpu", effort=SHORT)
        try:
            assert image(pipe).std() > 0
        finally:
            fit.revert()
        assert differences(before, snapshot(pipe)) == []
        return fit.profile

    def test_what_is_applied_was_verified_within_the_budget(self, first: Profile) -> None:
        assert first.measured.verified
        assert first.measured.peak_bytes <= first.budget_bytes == 10**9
        assert first.workload == Workload(64, 64, 4, passes=2)

    def test_the_second_time_the_stored_profile_is_used(
        self, pipe: Any, first: Profile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "find_plan", _fail)
        with autofit.apply(pipe, budget="1GB", steps=4, device="cpu") as fit:
            assert fit.profile == first
        with pytest.raises(NotImplementedError):  # another question is not answered by it
            autofit.apply(pipe, budget="2GB", steps=4, device="cpu")
        assert not hasattr(pipe, "_autofit")

    def test_for_more_than_was_measured_planning_begins_with_what_is_stored(
        self, pipe: Any, first: Profile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        began: list[Profile | None] = []

        def stopped(*_: Any, begin: Profile | None, **__: Any) -> Any:
            began.append(begin)
            raise NotImplementedError

        monkeypatch.setattr(session, "find_plan", stopped)
        for budget in ("1GB", "500MB"):
            with pytest.raises(NotImplementedError):
                autofit.apply(pipe, budget=budget, size=(128, 64), steps=4, device="cpu")
        assert began == [first, None]

    def test_plan_stores_too_and_leaves_the_pipe_as_found(
        self, pipe: Any, before: dict[str, object], home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = autofit.plan(
            pipe, budget=10**9, size=(128, 64), steps=1, device="cpu", effort=Effort(trials=1)
        )
        assert differences(before, snapshot(pipe)) == []
        assert (made.workload.width, made.workload.height) == (128, 64)
        (path,) = home.glob("profiles/*--128x64b1s1--*.yaml")
        assert store.load(path) == made
        assert len(store.load_why(path)["trials"]) == 1
        monkeypatch.setattr(session, "find_plan", _fail)
        with autofit.apply(pipe, budget=10**9, size=(128, 64), steps=1, device="cpu") as fit:
            assert fit.profile == made

    @pytest.mark.parametrize("name", ["tiny-flux", "tiny-sd3"])
    def test_of_a_transformer(self, name: str, pipes: Pipes) -> None:
        pipe = pipes[name]
        before = snapshot(pipe)
        effort = Effort(trials=1)
        with autofit.apply(pipe, budget="1GB", steps=2, device="cpu", effort=effort) as fit:
            assert fit.profile.pipeline == type(pipe).__name__
        assert differences(before, snapshot(pipe)) == []


def _fail(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("no search here")


class TestApplied:
    @pytest.fixture
    def pipe(self, pipes: Pipes) -> Iterator[Any]:
        """Whatever a test applies is undone at its end, and nothing is left."""
        pipe = pipes["tiny-sd"]
        before = snapshot(pipe)
        yield pipe
        assert differences(before, snapshot(pipe)) == []

    def test_changes_the_pipe_until_reverted(self, pipe: Any) -> None:
        plain = image(pipe)
        fit = autofit.apply(pipe, profile=profile_for(pipe), device="cpu")
        assert str(pipe.unet.dtype) == "torch.bfloat16"
        assert not np.array_equal(image(pipe), plain)
        fit.revert()
        fit.revert()  # does nothing
        assert str(pipe.unet.dtype) == "torch.float32"
        assert np.array_equal(image(pipe), plain)

    def test_an_exception_inside_reverts(self, pipe: Any) -> None:
        with (
            pytest.raises(ZeroDivisionError),
            autofit.apply(pipe, profile=profile_for(pipe), device="cpu"),
        ):
            raise ZeroDivisionError

    def test_an_error_while_applying_reverts(
        self, pipe: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("cannot be placed")

        monkeypatch.setattr(type(RESIDENT), "applied", broken)
        with pytest.raises(RuntimeError, match="cannot be placed"):
            autofit.apply(pipe, profile=profile_for(pipe), device="cpu")

    def test_twice_is_refused_until_reverted(self, pipe: Any) -> None:
        with autofit.apply(pipe, profile=profile_for(pipe), device="cpu"):
            with pytest.raises(BadInput, match=r"applied already: call revert\(\) on it first"):
                autofit.apply(pipe, profile=profile_for(pipe), device="cpu")
            with pytest.raises(BadInput, match="applied already"):
                autofit.plan(pipe, budget="1GB", device="cpu")
            assert str(pipe.unet.dtype) == "torch.bfloat16"
        autofit.apply(pipe, profile=profile_for(pipe), device="cpu").revert()

    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_profile_is_read_from_its_file(self, pipe: Any, kind: type, tmp_path: Path) -> None:
        profile = profile_for(pipe)
        store.save(profile, tmp_path / "profile.yaml")
        given = kind(tmp_path / "profile.yaml")
        with autofit.apply(pipe, profile=given, device="cpu") as fit:
            assert fit.profile == profile
            assert fit.match.level is Level.SAME

    def test_needs_a_budget_or_a_profile_not_both(self, pipe: Any) -> None:
        for given in ({}, {"budget": "1GB", "profile": profile_for(pipe)}):
            with pytest.raises(BadInput, match='apply needs one of budget="8GB" and profile='):
                autofit.apply(pipe, **given)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"budget": "8"}, "has no unit"),
            ({"size": (1000, 1001)}, "multiples of 8 pixels; the nearest is 1000x1000"),
            ({"batch": 0}, "batch 0 is below 1"),
            ({"steps": 0}, "steps 0 is below 1"),
            ({"fidelity": "nice"}, "one of exact, numeric, lossy"),
            ({"device": "tpu"}, "'tpu': not a device"),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, pipe: Any, asked: dict[str, Any], message: str
    ) -> None:
        for verb in (autofit.apply, autofit.plan):
            with pytest.raises(BadInput, match=message):
                verb(pipe, **({"budget": "1GB", "device": "cpu"} | asked))

    @pytest.mark.parametrize("given", ["sdxl", None, torch.nn.Linear(1, 1)])
    def test_what_is_no_pipe_is_refused(self, given: Any) -> None:
        with pytest.raises(BadInput, match="is no pipe: load one, as DiffusionPipeline"):
            autofit.apply(given, budget="1GB", device="cpu")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pipeline": "FluxPipeline"}, "for FluxPipeline, this pipe is a StableDiffusionPipe"),
            ({"fingerprint": "0" * 64}, "another StableDiffusionPipeline .configuration, dtypes"),
            (
                {"plan": Plan((KINDS["group_offload"](level="leaf", stream=True),))},
                "plan cannot run on .*streams need CUDA.: plan here with autofit plan",
            ),
        ],
    )
    def test_a_profile_for_something_else_is_refused(
        self, pipe: Any, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(BadInput, match=message) as raised:
            autofit.apply(pipe, profile=profile_for(pipe, **changes), device="cpu")
        assert "\n" not in str(raised.value)

    def test_a_profile_for_another_dtype_is_refused(self, pipe: Any) -> None:
        half = build("tiny-sd", dtype="bfloat16")
        with pytest.raises(BadInput, match="dtypes or adapters differ"):
            autofit.apply(half, profile=profile_for(pipe), device="cpu")


class TestTravelled:
    """A profile that was measured elsewhere, applied to a pipe in this process."""

    @pytest.fixture
    def pipe(self, pipes: Pipes) -> Iterator[Any]:
        pipe = pipes["tiny-sd"]
        before = snapshot(pipe)
        yield pipe
        assert differences(before, snapshot(pipe)) == []

    @pytest.fixture
    def trials(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Plan]:
        """The plans that are tried, in a user's folder of the test's own."""
        monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
        found: list[Plan] = []

        class Counted(InProcess):
            def measure(self, request: Request) -> Outcome:
                if request.full:  # not what it is compared with
                    found.append(request.plan)
                return super().measure(request)

        monkeypatch.setattr(session, "InProcess", Counted)
        return found

    @pytest.fixture
    def elsewhere(self, pipe: Any) -> Profile:
        return profile_for(pipe, on=samples.profile().on)

    def test_is_verified_before_the_first_use_and_not_before_the_next(
        self, pipe: Any, elsewhere: Profile, trials: list[Plan]
    ) -> None:
        with autofit.apply(pipe, profile=elsewhere, device="cpu") as fit:
            assert str(pipe.unet.dtype) == "torch.bfloat16"
        assert fit.match.level is Level.CARD
        (evidence,) = fit.profile.evidence
        assert isinstance(evidence.outcome, Measurement)
        assert evidence.outcome.verified
        assert evidence.on == environment(probe.probe_device("cpu"), elsewhere.budget_bytes)
        with autofit.apply(pipe, profile=elsewhere, device="cpu") as again:
            assert again.profile == fit.profile
        assert again.match.level is Level.SAME
        assert trials == [CHANGED]

    def test_is_applied_untried_where_that_is_asked_for(
        self, pipe: Any, elsewhere: Profile, trials: list[Plan]
    ) -> None:
        with autofit.apply(pipe, profile=elsewhere, device="cpu", verify=False) as fit:
            assert str(pipe.unet.dtype) == "torch.bfloat16"
        assert (fit.profile, fit.match.level, trials) == (elsewhere, Level.CARD, [])

    def test_steps_down_its_ladder_where_its_plan_does_not_run(
        self, pipe: Any, elsewhere: Profile, trials: list[Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("no such kernel in /home/ada/lib")

        monkeypatch.setattr(KINDS["sdpa"], "applied", broken)
        leaner = Plan((KINDS["half_precision"]("bfloat16"), RESIDENT))
        rung = Rung(leaner, samples.measurement(peak_bytes=samples.GIB, verified=False))
        given = dataclasses.replace(elsewhere, ladder=(rung,))
        with autofit.apply(pipe, profile=given, device="cpu") as fit:
            assert fit.profile.plan == leaner
        assert "verified here, it failed: error" in fit.match.reason
        assert trials == [CHANGED, leaner]
        texts = [path.read_text("utf-8") for path in store.folder().glob("profiles/*.yaml")]
        assert len(texts) == 2
        assert not any("ada" in text for text in texts)

    def test_is_found_by_a_budget_and_verified(
        self, pipe: Any, elsewhere: Profile, trials: list[Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.keep(elsewhere)
        monkeypatch.setattr(session, "find_plan", _fail)
        asked: dict[str, Any] = {"budget": "4GiB", "size": (64, 64), "steps": 2, "device": "cpu"}
        for level in (Level.CARD, Level.SAME):
            with autofit.apply(pipe, **asked) as fit:
                assert (fit.profile.plan, fit.match.level) == (CHANGED, level)
        assert trials == [CHANGED]


def test_where_a_model_was_loaded_from_is_not_in_its_profile(
    pipes: Pipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "ada-lovelace"
    pipes["tiny-sd"].save_pretrained(folder)
    asked: dict[str, Any] = {"budget": "1GB", "size": (64, 64), "steps": 1, "device": "cpu"}
    autofit.plan(load(str(folder)), **asked, effort=Effort(trials=1))
    (path,) = store.folder().glob("profiles/*.yaml")
    assert not re.search("ada-lovelace|/", path.read_text("utf-8"))


class TestOffloadedAlready:
    """A pipe whose placement somebody else manages is refused in one line, and let be."""

    @pytest.fixture
    def pipe(self) -> Any:
        return build("tiny-sd")

    def refusal(self, pipe: Any) -> str:
        meta = any(p.is_meta for p in pipe.unet.parameters())
        before = {} if meta else snapshot(pipe)
        messages = set()
        for asked in ({"profile": profile_for(pipe)}, {"budget": "1GB"}):
            with pytest.raises(BadInput) as raised:
                autofit.apply(pipe, device="cpu", **asked)
            messages.add(str(raised.value))
        assert differences(before, {} if meta else snapshot(pipe)) == []
        (message,) = messages
        assert "\n" not in message
        return message

    def test_by_accelerate(self, pipe: Any) -> None:
        add_hook_to_module(pipe.unet, ModelHook())
        message = self.refusal(pipe)
        assert message.startswith("StableDiffusionPipeline.unet is offloaded already: call pipe.")

    def test_by_accelerate_in_a_layer(self, pipe: Any) -> None:
        add_hook_to_module(pipe.vae.decoder.conv_in, ModelHook())
        assert "vae is offloaded already" in self.refusal(pipe)

    def test_by_sequential_offload(self, pipe: Any) -> None:
        pipe.enable_sequential_cpu_offload(device="cpu")
        assert "offloaded already" in self.refusal(pipe)

    @pytest.mark.parametrize("level", ["block_level", "leaf_level"])
    def test_by_groups(self, pipe: Any, level: str) -> None:
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(pipe.unet, "cpu", offload_type=level, **blocks)
        assert "unet is group-offloaded already: load the pipe anew" in self.refusal(pipe)


class TestImages:
    def test_one_for_each_of_the_batch(self, pipes: Pipes, tmp_path: Path) -> None:
        workload = Workload(64, 128, 1, batch=2, passes=2)
        images = session.generate(pipes["tiny-sd"], workload, "a cat", 0)
        paths = session.save_images(images, tmp_path / "cat.png")
        assert paths == [tmp_path / "cat-0.png", tmp_path / "cat-1.png"]
        found = [np.asarray(Image.open(path)) for path in paths]
        assert [f.shape for f in found] == [(128, 64, 3)] * 2
        assert not np.array_equal(*found)
        one = dataclasses.replace(workload, batch=1)
        alone = session.generate(pipes["tiny-sd"], one, "a cat", 1)
        assert session.save_images(alone, tmp_path / "cat.png") == [tmp_path / "cat.png"]
        # seed + 1: the second of the batch, but for how a smaller batch is rounded
        assert np.abs(np.asarray(alone[0]).astype(int) - found[1]).max() <= 1

    @pytest.mark.parametrize("name", ["image", "image.xyz"])
    def test_a_name_without_a_format_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"is no image format; write NAME\.png"):
            session.check_image(tmp_path / name)
        session.check_image(tmp_path / "image.PNG")

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"cannot be written \(No such file.+; give another"):
            session.save_images([Image.new("RGB", (8, 8))], tmp_path / "no" / "image.png")
