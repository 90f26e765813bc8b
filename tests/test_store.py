from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autofit import store
from autofit.plain import from_yaml, to_yaml
from autofit.spec import BadInput, Environment, Fidelity, Measurement, Plan, Profile, Slot, Workload
from autofit.techniques import CANDIDATES, KINDS

GOLDEN = Path(__file__).parent / "golden" / "profile-1.yaml"

SECONDS = st.floats(0, 1e9, allow_subnormal=True)
BYTES = st.integers(0, 2**60)
COUNTS = st.integers(1, 10**6)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    chosen = []
    for slot in Slot:
        of_slot = [t for t in CANDIDATES if t.slot is slot]
        none = [] if slot is Slot.PLACEMENT else [None]
        chosen.append(draw(st.sampled_from([*none, *of_slot])))
    return Plan(tuple(t for t in chosen if t is not None))


MEASUREMENTS = st.builds(
    Measurement,
    image_s=SECONDS.filter(bool),
    peak_bytes=BYTES,
    encode_s=SECONDS,
    step_s=st.lists(SECONDS, max_size=4).map(tuple),
    decode_s=SECONDS,
    warmup_s=SECONDS,
    phase_peak_bytes=st.dictionaries(st.sampled_from(["encode", "step", "decode"]), BYTES),
    non_torch_bytes=BYTES,
    steps_run=BYTES,
    runs_s=st.lists(SECONDS, max_size=3).map(tuple),
    verified=st.booleans(),
    psnr_db=st.none() | st.just(math.inf) | st.floats(-200, 200),
    reference=st.none() | st.text(),
)
PROFILES = st.builds(
    Profile,
    pipeline=st.text(),
    fingerprint=st.text(),
    workload=st.builds(Workload, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS),
    budget_bytes=COUNTS,
    plan=plans(),
    measured=MEASUREMENTS,
    on=st.builds(
        Environment,
        device=st.text(),
        capability=st.none() | st.tuples(BYTES, BYTES),
        total_bytes=BYTES,
        cap=st.sampled_from(["emulated", "card", "tracked"]),
        versions=st.dictionaries(st.text(), st.text(), max_size=3),
    ),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------- round trip


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(PROFILES)
def test_a_profile_comes_back_exactly(tmp_path: Path, profile: Profile) -> None:
    store.save(profile, tmp_path / "profile.yaml")
    assert store.load(tmp_path / "profile.yaml") == profile


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "\ufeffx", "a\r\nb", "x: y", "\t"])
def test_text_of_any_kind_comes_back_exactly(text: str) -> None:
    assert from_yaml(to_yaml({"text": text, "list": [text]})) == {"text": text, "list": [text]}


@pytest.mark.parametrize("technique", CANDIDATES, ids=lambda t: t.label)
def test_every_technique_comes_back_exactly(tmp_path: Path, technique: Any) -> None:
    placement = () if technique.slot is Slot.PLACEMENT else (samples.RESIDENT,)
    profile = samples.profile(plan=Plan((technique, *placement)))
    store.save(profile, tmp_path / "profile.yaml")
    assert store.load(tmp_path / "profile.yaml") == profile


@pytest.mark.parametrize(
    "text",
    ["010", "1:30", "0x1f", "1e5", "2026-01-01", "on", "~", "", "a: b", "# a", "2.10", " \n\t"],
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    on = dataclasses.replace(samples.profile().on, versions={text: text}, device=text)
    store.save(samples.profile(on=on), tmp_path / "profile.yaml")
    assert store.load(tmp_path / "profile.yaml").on == on


def test_the_golden_profile_of_schema_1_is_read() -> None:
    assert store.load(GOLDEN) == samples.profile()


def test_the_file_is_laid_out_for_a_reader(tmp_path: Path) -> None:
    store.save(samples.profile(), tmp_path / "profile.yaml")
    text = (tmp_path / "profile.yaml").read_text("utf-8")
    assert text.startswith("# autofit profile: measured in whole generations;")
    keys = ["schema", "pipeline", "workload", "budget_bytes", "plan", "measured", "on"]
    assert list(yaml.safe_load(text)) == keys
    assert "step_s: [0.0173, 0.0161, 0.0161]\n" in text
    assert "- technique: tiled_vae\n  tile_px: 512\n" in text


# ---------------------------------------------------------------- writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.yaml"
    store.save(samples.profile(), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device") as error:
        store.save(samples.profile(fingerprint="other"), path)
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == [path]
    assert store.load(path) == samples.profile()


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(samples.profile(), tmp_path / "profile.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing/profile.yaml", ".", "file/profile.yaml"])
def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot be written"):
        store.save(samples.profile(), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------- the schema


def test_the_schema_has_an_entry_for_every_technique() -> None:
    schema = store.json_schema()
    keys = ["schema", "pipeline", "workload", "budget_bytes", "plan", "measured", "on"]
    assert sorted(schema["required"]) == sorted(keys)
    assert schema["additionalProperties"] is False
    entries = schema["properties"]["plan"]["items"]["discriminator"]["mapping"]
    assert set(entries) == set(KINDS)
    tiled = schema["$defs"][entries["tiled_vae"].rpartition("/")[2]]
    assert set(tiled["properties"]) == {"technique", "tile_px", "overlap", "sliced"}
    assert sorted(tiled["required"]) == ["overlap", "technique", "tile_px"]


# ---------------------------------------------------------------- the folder


def test_the_folder_is_the_users_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFIT_HOME", "~/fits")
    assert store.folder() == Path.home() / "fits"
    monkeypatch.setenv("AUTOFIT_HOME", "")
    assert store.folder().name == "autofit"


def found(**changes: Any) -> Profile | None:
    asked = samples.profile()
    facts: dict[str, Any] = {
        "fingerprint": asked.fingerprint,
        "workload": asked.workload,
        "budget_bytes": asked.budget_bytes,
        "device": samples.device(),
    }
    return store.find(**(facts | changes))


def test_what_is_kept_is_found(home: Path) -> None:
    assert found() is None
    path = store.keep(samples.profile())
    assert path.parent == home / "profiles"
    prefix = "StableDiffusionPipeline--NVIDIA-H200--4.00GiB--512x512b1s50--"
    assert path.name.startswith(prefix)
    assert found() == samples.profile()


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "other"},
        {"workload": Workload(512, 512, 50, passes=1)},
        {"budget_bytes": 5 * samples.GIB},
        {"device": samples.device(name="NVIDIA H100")},
        {"device": samples.device(total_bytes=80 * samples.GIB)},
        *(
            {"device": samples.device(versions=samples.VERSIONS | {package: "0"})}
            for package in store.VERSIONS
        ),
    ],
    ids=str,
)
def test_another_question_does_not_find_it(home: Path, changes: dict[str, Any]) -> None:
    store.keep(samples.profile())
    assert found(**changes) is None


def test_another_python_finds_it(home: Path) -> None:
    store.keep(samples.profile())
    versions = samples.VERSIONS | {"python": "3.11.0"}
    assert found(device=samples.device(versions=versions)) == samples.profile()


def test_the_fastest_within_the_budget_is_found(home: Path) -> None:
    slow = samples.profile(plan=samples.SLOW, measured=samples.measurement(image_s=3.0))
    over = samples.profile(
        plan=Plan((samples.RESIDENT,)),
        measured=samples.measurement(image_s=0.1, peak_bytes=4 * samples.GIB + 1),
    )
    for profile in (slow, over, samples.profile()):
        store.keep(profile)
    assert len(list((home / "profiles").iterdir())) == 3
    assert found() == samples.profile()


def test_a_faster_plan_of_lower_fidelity_does_not_hide_a_faithful_one(home: Path) -> None:
    exact = samples.profile(plan=samples.SLOW, measured=samples.measurement(image_s=3.0))
    store.keep(exact)
    store.keep(samples.profile())
    assert found(at_worst=Fidelity.EXACT) == exact
    assert found(at_worst=Fidelity.LOSSY) == samples.profile()


def test_the_same_plan_measured_again_takes_the_place(home: Path) -> None:
    first = store.keep(samples.profile())
    again = samples.profile(measured=samples.measurement(image_s=0.9))
    assert store.keep(again) == first
    assert found() == again


def test_workloads_that_look_alike_are_kept_apart(home: Path) -> None:
    guided = store.keep(samples.profile())
    unguided = store.keep(samples.profile(workload=Workload(512, 512, 50, passes=1)))
    assert guided != unguided


def test_a_file_that_is_no_profile_is_passed_over_with_a_warning(home: Path) -> None:
    store.keep(samples.profile())
    (home / "profiles" / "notes.yaml").write_text("- milk\n")
    with pytest.warns(UserWarning, match=r"passed over: profile .*notes\.yaml: not a mapping"):
        assert found() == samples.profile()


@given(st.text(min_size=1), st.text(min_size=1))
def test_file_names_are_safe(pipeline: str, device: str) -> None:
    on = dataclasses.replace(samples.profile().on, device=device)
    name = store._file_name(samples.profile(pipeline=pipeline, on=on))
    assert name.isascii()
    assert len(name) < 255
    assert set('/\\:*?"<>| \n\0').isdisjoint(name)


def test_a_folder_that_cannot_be_made_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"cannot be made .* set AUTOFIT_HOME"):
        store.keep(samples.profile())
