"""`autofit verify`: a profile's plan run here, or predicted for a card that is not here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import samples
from conftest import Pipes
from test_cli import Ended, autofit

from autofit import cost, gpus, probe, session, store, verifying
from autofit.forecast import PUBLISHED_BAND
from autofit.match import environment
from autofit.plain import plain
from autofit.spec import (
    Device,
    Evidence,
    Failure,
    Measurement,
    Outcome,
    Part,
    Phase,
    Plan,
    Profile,
    Rung,
    Why,
    Workload,
)
from autofit.techniques import KINDS
from autofit.trial import InProcess, Request

GB = 10**9
SHIPPED = sorted((Path(__file__).parent.parent / "profiles").glob("*.yaml"))
WORKLOAD = Workload(64, 64, 2, passes=2)
PLAN = Plan((KINDS["half_precision"]("bfloat16"), samples.RESIDENT))
OFFLOAD = Plan((KINDS["sequential_offload"](),))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of profiles of each test's own; what is cached of dry runs and devices is shared."""
    shared, own = store.folder() / "cache", tmp_path / "home"
    own.mkdir()
    (own / "cache").symlink_to(shared)
    monkeypatch.setenv("AUTOFIT_HOME", str(own))
    return own


@pytest.fixture(scope="module")
def cpu() -> Device:
    return probe.probe_device("cpu")


@pytest.fixture
def profile(pipes: Pipes, cpu: Device) -> Profile:
    """A plan of tiny-sd that was measured on this machine with another torch."""
    facts = probe.facts(pipes["tiny-sd"])
    older = replace(cpu, versions={**cpu.versions, "torch": "2.6.0"})
    return samples.profile(
        pipeline=facts.cls,
        fingerprint=facts.fingerprint,
        workload=WORKLOAD,
        budget_bytes=GB,
        plan=PLAN,
        measured=samples.measurement(peak_bytes=GB // 2),
        on=environment(older, GB),
        components=tuple(map(Part.of, facts.components)),
    )


@pytest.fixture
def path(profile: Profile, tmp_path: Path) -> Path:
    path = tmp_path / "profile.yaml"
    store.save(profile, path)
    return path


def verify(path: Path, *options: object, model: str = "tiny-sd") -> Ended:
    return autofit("verify", str(path), model, *map(str, options))


def refusal(path: Path, *options: object, model: str = "tiny-sd") -> str:
    """The one line that bad input gives; the profile's file is as it was."""
    before = path.read_bytes() if path.exists() else None
    ended = verify(path, *options, model=model)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert (path.read_bytes() if path.exists() else None) == before
    return ended.complaint


# ---------------------------------------------------------------- measured


@pytest.fixture
def in_process(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Request]]:
    """Trials in this process, with an outcome or their own. Returns what they are asked."""

    def measuring(outcome: Outcome | None = None) -> list[Request]:
        asked: list[Request] = []

        class Measurer(InProcess):
            def measure(self, request: Request) -> Outcome:
                asked.append(request)
                return super().measure(request) if outcome is None else outcome

        @contextmanager
        def opened(model: str, device: str, dtype: str | None = None) -> Iterator[Measurer]:
            yield Measurer(pipes[model], device)

        monkeypatch.setattr(session, "measuring", opened)
        return asked

    return measuring


class TestMeasured:
    def test_in_a_worker_and_written_into_the_profile(
        self, profile: Profile, path: Path, cpu: Device, home: Path
    ) -> None:
        ended = verify(path, "--device", "cpu")
        assert (ended.code, ended.err) == (0, "")
        found = store.load(path)
        (evidence,) = found.evidence
        assert replace(found, evidence=()) == profile
        assert evidence.on == environment(cpu, GB)
        assert isinstance(evidence.outcome, Measurement)
        assert evidence.outcome.verified
        assert len(evidence.outcome.step_s) == WORKLOAD.steps
        assert 0 < evidence.outcome.peak_bytes <= GB
        first, second = ended.out.splitlines()
        assert re.fullmatch(
            r"same card, other versions or driver: measured with torch 2\.6\.0, here \S+;"
            r" verified here: .+ a generation, peak .+ MiB,"
            r" its image [\d.]+ dB \(PSNR\) from that of resident",
            first,
        )
        assert second == f"profile   {path}"
        (kept,) = home.glob("profiles/*.yaml")
        assert store.load(kept) == found

    def test_json_is_alone_on_stdout(
        self, path: Path, in_process: Callable[..., list[Request]]
    ) -> None:
        asked = in_process()
        ended = verify(path, "--device", "cpu", "--json")
        assert (ended.code, ended.err) == (0, "")
        found = json.loads(ended.out)
        assert set(found) == {"match", "measured", "path"}
        assert found["match"]["level"] == "same card, other versions or driver"
        assert found["path"] == str(path)
        (evidence,) = store.load(path).evidence
        assert isinstance(evidence.outcome, Measurement)
        assert found["measured"]["image_s"] == evidence.outcome.image_s
        _, request = asked
        assert (request.plan, request.workload, request.full) == (PLAN, WORKLOAD, True)
        assert request.cap_bytes == GB

    def test_output_leaves_the_profile_and_the_folder_as_they_were(
        self, path: Path, home: Path, in_process: Callable[..., list[Request]]
    ) -> None:
        in_process(samples.measurement())
        before, other = path.read_bytes(), path.with_name("verified.yaml")
        ended = verify(path, "--device", "cpu", "--output", other)
        assert ended.code == 0
        assert ended.out.splitlines()[-1] == f"profile   {other}"
        assert path.read_bytes() == before
        assert [e.outcome for e in store.load(other).evidence] == [samples.measurement()]
        assert not (home / "profiles").exists()

    def test_a_plan_that_does_not_hold_is_exit_3_and_written_without_its_words(
        self, path: Path, cpu: Device, in_process: Callable[..., list[Request]]
    ) -> None:
        failure = Failure(Why.OUT_OF_MEMORY, "no room for /home/ada/models", Phase.DECODE, 7)
        in_process(failure)
        ended = verify(path, "--device", "cpu")
        assert ended.code == 3
        assert ended.err == (
            f"autofit: profile {path}: its plan does not hold here: out of memory: no room for"
            " /home/ada/models; plan here with autofit plan\n"
        )
        assert "verified here, it failed: out of memory in decode" in ended.out
        expected = Evidence(replace(failure, detail=""), environment(cpu, GB))
        assert store.load(path).evidence == (expected,)
        assert "ada" not in path.read_text("utf-8")

    def test_a_failure_as_json(self, path: Path, in_process: Callable[..., list[Request]]) -> None:
        in_process(Failure(Why.CRASH, "worker ended by SIGSEGV"))
        ended = verify(path, "--device", "cpu", "--json")
        assert ended.code == 3
        assert json.loads(ended.out)["failure"]["why"] == "crash"

    def test_what_failed_here_before_is_run_again_and_the_latest_counts(
        self, profile: Profile, path: Path, home: Path, cpu: Device,
        in_process: Callable[..., list[Request]],
    ) -> None:  # fmt: skip
        failed = Evidence(Failure(Why.OUT_OF_MEMORY, ""), environment(cpu, GB))
        store.keep(replace(profile, evidence=(failed,)))
        store.save(replace(profile, evidence=(failed,)), path)
        asked = in_process(samples.measurement())
        assert verify(path, "--device", "cpu").code == 0
        assert [request.plan for request in asked if request.full] == [PLAN]
        (evidence,) = store.with_kept(store.load(path)).evidence
        assert evidence == Evidence(samples.measurement(), environment(cpu, GB))

    def test_a_profile_of_another_pipeline(
        self, path: Path, in_process: Callable[..., list[Request]]
    ) -> None:
        asked = in_process()
        said = refusal(path, "--device", "cpu", model="tiny-flux")
        assert said == (
            f"profile {path}: it is for StableDiffusionPipeline, this pipe is a FluxPipeline:"
            " plan here with autofit plan"
        )
        assert asked == []

    def test_a_plan_that_cannot_run_here(
        self, profile: Profile, path: Path, in_process: Callable[..., list[Request]]
    ) -> None:
        asked = in_process()
        plan = Plan((KINDS["group_offload"](level="leaf", stream=True),))
        store.save(replace(profile, plan=plan), path)
        assert re.search("its plan cannot run on .*need CUDA", refusal(path, "--device", "cpu"))
        assert asked == []


# ---------------------------------------------------------------- predicted


GPU = ("--gpu", "rtx-4060")


class TestPredicted:
    def test_json_has_the_same_plan_and_a_band_of_time(self, profile: Profile, path: Path) -> None:
        before = path.read_bytes()
        ended = verify(path, *GPU, "--json")
        assert (ended.code, ended.err) == (0, "")
        found = json.loads(ended.out)
        assert list(found) == ["match", "plan", "needed_bytes", "predicted", "image_s_band", "on"]
        assert found["match"]["level"] == "other card with enough memory"
        assert found["plan"] == [
            {"technique": "half_precision", "dtype": "bfloat16"},
            {"technique": "resident"},
        ]
        image_s, (least_s, most_s) = found["predicted"]["image_s"], found["image_s_band"]
        assert least_s == pytest.approx(image_s * (1 - PUBLISHED_BAND))
        assert most_s == pytest.approx(image_s * (1 + PUBLISHED_BAND))
        assert 0 < least_s < image_s < most_s
        assert set(found["predicted"]["phase_s"]) == set(Phase)
        assert 0 < found["predicted"]["peak_bytes"] < found["on"]["total_bytes"]
        card = gpus.device_for("rtx-4060")
        measured = profile.measured  # what is not the allocator's is the card's own
        allocated_bytes = measured.peak_bytes - measured.non_torch_bytes
        assert found["needed_bytes"] == allocated_bytes + cost.outside_bytes(card)
        assert found["on"]["device"] == "NVIDIA GeForce RTX 4060"
        assert path.read_bytes() == before

    @pytest.mark.parametrize("name", ["resident", "model_offload", "sequential_offload"])
    def test_the_placement_is_the_profile_s(self, name: str, profile: Profile, path: Path) -> None:
        store.save(replace(profile, plan=Plan((KINDS[name](),))), path)
        found = json.loads(verify(path, *GPU, "--json").out)
        assert [t["technique"] for t in found["plan"]] == [name]

    def test_in_words(self, path: Path) -> None:
        ended = verify(path, *GPU)
        assert (ended.code, ended.err) == (0, "")
        rows = dict(line.split(maxsplit=1) for line in ended.out.splitlines() if line[0] != " ")
        assert rows["pipeline"] == "StableDiffusionPipeline, 64x64, 2 steps, with guidance"
        assert rows["plan"] == "half_precision(dtype=bfloat16)"
        assert "\n          resident\n" in ended.out
        assert rows["match"].startswith("other card with enough memory: measured on ")
        peak = r"about [\d.]+ [MG]iB of 7\.\d+ GiB, by what was measured"
        assert re.fullmatch(peak, rows["peak"])
        assert re.fullmatch(r"about .+s a generation, .+s to .+s", rows["time"])
        assert rows["predicted"].startswith("by dry run, not measured: ")

    def test_the_fingerprint_of_the_loaded_pipe_is_not_asked_of_a_dry_run(
        self, profile: Profile, path: Path
    ) -> None:
        store.save(replace(profile, fingerprint="f" * 64), path)
        assert verify(path, *GPU).code == 0

    def test_a_plan_too_large_for_the_card_gives_way_to_a_leaner_one(
        self, profile: Profile, path: Path
    ) -> None:
        large, small = (samples.measurement(peak_bytes=size * GB) for size in (20, 1))
        rung = Rung(OFFLOAD, small)
        store.save(replace(profile, budget_bytes=24 * GB, measured=large, ladder=(rung,)), path)
        found = json.loads(verify(path, *GPU, "--json").out)
        assert [t["technique"] for t in found["plan"]] == ["sequential_offload"]
        assert "a leaner plan of the profile, whose own did not hold" in found["match"]["reason"]
        store.save(replace(profile, budget_bytes=24 * GB, measured=large), path)
        assert re.search(
            r"NVIDIA GeForce RTX 4060 has 7\.\d+ GiB, and the plan needs 18\.\d+ GiB",
            refusal(path, *GPU),
        )

    def test_a_profile_of_another_pipeline(self, path: Path) -> None:
        assert refusal(path, *GPU, model="tiny-flux") == (
            f"profile {path}: it is for StableDiffusionPipeline, this pipe is a FluxPipeline:"
            " plan for it with autofit plan"
        )

    def test_a_profile_of_another_model_of_the_same_class(
        self, profile: Profile, path: Path
    ) -> None:
        unet = next(p for p in profile.components if p.name == "unet")
        larger = replace(unet, weight_bytes=2 * unet.weight_bytes)
        parts = tuple(larger if p is unet else p for p in profile.components)
        store.save(replace(profile, components=parts), path)
        assert re.search(r"\(unet has .+ in the profile, .+ here\)", refusal(path, *GPU))


@pytest.mark.parametrize(
    "name",
    [
        "sd15--H200--8GiB--3840x2224-20steps",
        pytest.param("sdxl--H100--8GiB--1024x1024-30steps", marks=pytest.mark.slow),
        pytest.param("flux-dev--H200--8GiB--1024x1024-28steps", marks=pytest.mark.slow),
    ],
)
def test_what_is_shipped_for_8_gib_keeps_its_plan_on_a_card_of_8_gib(name: str) -> None:
    """Measured on a card ten times as large, whose allocator was capped."""
    path = next(p for p in SHIPPED if p.stem == name)
    profile = store.load(path)
    ended = autofit("verify", str(path), name.partition("--")[0], *GPU, "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found["match"]["level"] == "other card with enough memory"
    assert found["plan"] == plain(profile.plan)
    image_s, (least_s, most_s) = found["predicted"]["image_s"], found["image_s_band"]
    assert profile.measured.image_s < least_s < image_s < most_s
    assert found["predicted"]["peak_bytes"] < found["on"]["total_bytes"] < 8 * samples.GIB
    assert found["needed_bytes"] < found["on"]["total_bytes"]


def test_what_was_measured_counts_where_a_dry_run_needs_more_than_the_card_has() -> None:
    path = next(p for p in SHIPPED if p.stem == "sd35-medium--H100--8GiB--1024x1024-40steps")
    ended = autofit("verify", str(path), "sd35-medium", *GPU, "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found["plan"] == plain(store.load(path).plan)
    total_bytes = found["on"]["total_bytes"]
    assert found["needed_bytes"] < total_bytes < found["predicted"]["peak_bytes"]


# ---------------------------------------------------------------- the model that it is for


class TestModel:
    def test_is_found_by_the_profile_where_it_is_built_in(
        self, path: Path, in_process: Callable[..., list[Request]]
    ) -> None:
        asked = in_process(samples.measurement())
        ended = autofit("verify", str(path), "--device", "cpu")
        assert (ended.code, ended.err) == (0, "")
        assert asked[-1].plan == PLAN
        assert autofit("verify", str(path), *GPU).code == 0

    @pytest.mark.parametrize("name", sorted({path.name.partition("--")[0] for path in SHIPPED}))
    def test_of_what_is_shipped(self, name: str) -> None:
        first, *others = [path for path in SHIPPED if path.name.startswith(f"{name}--")]
        shipped = store.load(first)
        assert verifying._built_in(shipped, first, None) == name
        assert {store.load(path).fingerprint for path in others} <= {shipped.fingerprint}

    @pytest.mark.parametrize("options", [("--device", "cpu"), GPU])
    @pytest.mark.parametrize(
        ("changes", "dtype"), [({"fingerprint": "f" * 64}, ()), ({}, ("--dtype", "bfloat16"))]
    )
    def test_is_to_be_named_where_it_is_not(
        self,
        options: tuple[str, ...],
        changes: dict[str, Any],
        dtype: tuple[str, ...],
        profile: Profile,
        path: Path,
    ) -> None:
        store.save(replace(profile, **changes), path)
        ended = autofit("verify", str(path), *options, *dtype)
        assert ended.code == 2
        assert ended.complaint == (
            f"profile {path}: no built-in StableDiffusionPipeline has its configuration and dtypes:"
            " name the model that it is for, as autofit verify profile.yaml org/name"
        )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "rtx-4061"), r"gpu 'rtx-4061' is not in the table\. Did you mean .+"),
        ((*GPU, "--device", "cpu"), r"gpu 'rtx-4060' is predicted, not measured: leave out .+"),
        ((*GPU, "--output", "x.yaml"), r"gpu 'rtx-4060' is predicted, not measured: .+"),
        (("--device", "tpu"), r"device 'tpu': not a device; .+"),
        (("--device", "cpu", "--output", "no/x.yaml"), r"output .+: there is no folder 'no'"),
        (("--device", "cpu", "--output", "."), r"output '\.' is a folder; give a file in it"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_model_is_loaded(
    options: tuple[str, ...], message: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(session, "measuring", loading)
    said = refusal(path, *options)
    assert re.fullmatch(message, said), said


@pytest.mark.parametrize("options", [("--device", "cpu"), GPU])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"profile .+: cannot be read \(No such file or directory\): .+"),
        ("- milk\n", r"profile .+: not a mapping of .+"),
        ("predicted: {}\n", r"profile .+: a prediction, which nothing measured: .+"),
    ],
)
def test_a_file_that_is_no_profile(
    options: tuple[str, ...], text: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "spoilt.yaml"
    if text is not None:
        path.write_text(text)
    said = refusal(path, *options)
    assert re.fullmatch(message, said), said
