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

from autofit import files, places, store
from autofit.places import Question, at
from autofit.plain import from_yaml, to_yaml
from autofit.schema import json_schema
from autofit.spec import (
    SOFTWARE,
    BadInput,
    Environment,
    Evidence,
    Failure,
    Measurement,
    Part,
    Phase,
    Plan,
    Profile,
    Rung,
    Slot,
    Why,
    Workload,
)
from autofit.techniques import CANDIDATES, KINDS

GOLDEN = Path(__file__).parent / "golden"

SECONDS = st.floats(0, 1e9, allow_subnormal=True)
BYTES = st.integers(0, 2**60)
COUNTS = st.integers(1, 10**6)
REQUIRED = ("schema", "pipeline", "workload", "budget_bytes", "plan", "measured", "on")


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
    latents_psnr_db=st.none() | st.just(math.inf) | st.floats(-200, 200),
)
FAILURES = st.builds(
    Failure,
    why=st.sampled_from(Why),
    detail=st.just(""),
    phase=st.none() | st.sampled_from(Phase),
    needed_bytes=st.none() | BYTES,
)
RATES = st.none() | st.floats(0, 1e15)
ENVIRONMENTS = st.builds(
    Environment,
    device=st.text(),
    capability=st.none() | st.tuples(BYTES, BYTES),
    total_bytes=BYTES,
    cap=st.sampled_from(["emulated", "card", "tracked"]),
    versions=st.dictionaries(st.text(), st.text(), max_size=3),
    pinned_bytes_s=RATES,
    pageable_bytes_s=RATES,
)


def few(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=2).map(tuple)


PROFILES = st.builds(
    Profile,
    pipeline=st.text(),
    fingerprint=st.text(),
    workload=st.builds(Workload, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS),
    budget_bytes=COUNTS,
    plan=plans(),
    measured=MEASUREMENTS,
    on=ENVIRONMENTS,
    components=few(st.builds(Part, st.text(), st.text(), st.text(), BYTES)),
    adapters=few(st.text()),
    ladder=few(st.builds(Rung, plans(), MEASUREMENTS)),
    evidence=few(st.builds(Evidence, MEASUREMENTS | FAILURES, ENVIRONMENTS)),
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


def test_slices_written_before_they_had_a_size_are_of_one_image(tmp_path: Path) -> None:
    profile = samples.profile(plan=Plan((KINDS["sliced_vae"](), samples.RESIDENT)))
    store.save(profile, path := tmp_path / "profile.yaml")
    assert "images" not in path.read_text("utf-8")
    assert store.load(path) == profile
    old = "- technique: sliced_vae\n"
    for images in (1, 4):
        path.write_text(path.read_text("utf-8").replace(old, f"{old}  images: {images}\n"), "utf-8")
        assert store.load(path).plan == Plan((KINDS["sliced_vae"](images), samples.RESIDENT))
        store.save(profile, path)


@pytest.mark.parametrize(
    "text",
    ["010", "1:30", "0x1f", "1e5", "2026-01-01", "on", "~", "", "a: b", "# a", "2.10", " \n\t"],
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    on = dataclasses.replace(samples.profile().on, versions={text: text}, device=text)
    store.save(samples.profile(on=on), tmp_path / "profile.yaml")
    assert store.load(tmp_path / "profile.yaml").on == on


@pytest.mark.parametrize(("schema", "expected"), [(1, samples.profile()), (2, samples.travelled())])
def test_the_golden_profile_of_each_schema_is_read(schema: int, expected: Profile) -> None:
    assert store.load(GOLDEN / f"profile-{schema}.yaml") == expected


def test_the_golden_profile_of_the_current_schema_is_what_is_written(tmp_path: Path) -> None:
    store.save(samples.travelled(), tmp_path / "profile.yaml")
    header, *lines = (GOLDEN / "profile-2.yaml").read_text("utf-8").splitlines()
    assert lines[0] == "# test data: these figures were measured nowhere"
    assert (tmp_path / "profile.yaml").read_text("utf-8").splitlines() == [header, *lines[1:]]


def test_an_old_profile_that_is_saved_again_is_of_the_current_schema(tmp_path: Path) -> None:
    found = store.load(GOLDEN / "profile-1.yaml")
    store.save(found, tmp_path / "profile.yaml")
    assert "\nschema: 2\n" in (tmp_path / "profile.yaml").read_text("utf-8")
    assert store.load(tmp_path / "profile.yaml") == found


def test_the_words_of_a_failure_are_not_stored(tmp_path: Path) -> None:
    told = Failure(Why.ERROR, "no file '/home/ada/models/vae.safetensors'", Phase.DECODE)
    evidence = Evidence(told, samples.profile().on)
    store.save(samples.profile(evidence=(evidence,)), tmp_path / "profile.yaml")
    assert "ada" not in (tmp_path / "profile.yaml").read_text("utf-8")
    (read,) = store.load(tmp_path / "profile.yaml").evidence
    assert read.outcome == dataclasses.replace(told, detail="")


def test_the_file_is_laid_out_for_a_reader(tmp_path: Path) -> None:
    store.save(samples.profile(), tmp_path / "profile.yaml")
    text = (tmp_path / "profile.yaml").read_text("utf-8")
    assert text.startswith("# autofit profile: measured in whole generations;")
    assert list(yaml.safe_load(text)) == list(REQUIRED)
    store.save(samples.travelled(), tmp_path / "travelled.yaml")
    travelled = yaml.safe_load((tmp_path / "travelled.yaml").read_text("utf-8"))
    assert list(travelled) == [*REQUIRED, "ladder", "evidence"]
    assert list(travelled["pipeline"]) == ["cls", "fingerprint", "components", "adapters"]
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

    monkeypatch.setattr(files.os, "fsync", full)
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

    monkeypatch.setattr(files.os, "fsync", interrupt)
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


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def test_the_schema_has_an_entry_for_every_technique(schema: dict[str, Any]) -> None:
    for plan in (schema["properties"]["plan"], schema["$defs"]["Rung"]["properties"]["plan"]):
        entries = plan["items"]["discriminator"]["mapping"]
        assert set(entries) == set(KINDS)
    tiled = schema["$defs"][entries["tiled_vae"].rpartition("/")[2]]
    assert set(tiled["properties"]) == {"technique", "tile_px", "overlap", "sliced"}
    assert sorted(tiled["required"]) == ["overlap", "technique", "tile_px"]
    sliced = schema["$defs"][entries["sliced_vae"].rpartition("/")[2]]
    assert sliced["properties"]["images"]["default"] == 1
    assert sliced["required"] == ["technique"]


def test_the_schema_requires_what_schema_1_had_and_takes_nothing_unknown(
    schema: dict[str, Any],
) -> None:
    assert sorted(schema["required"]) == sorted(REQUIRED)
    assert set(schema["properties"]) == {*REQUIRED, "ladder", "evidence"}
    assert schema["additionalProperties"] is False
    failed = schema["$defs"]["_Failed"]
    assert set(failed["properties"]) == {"why", "phase", "needed_bytes"}
    assert failed["additionalProperties"] is False


# ---------------------------------------------------------------- the folder


def test_the_folder_is_the_users_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFIT_HOME", "~/fits")
    assert store.folder() == Path.home() / "fits"
    monkeypatch.setenv("AUTOFIT_HOME", "")
    assert store.folder().name == "autofit"


def found(home: Path, versions: dict[str, str]) -> Profile | None:
    kept, device = samples.profile(), samples.device(versions=versions)
    question = Question(kept.fingerprint, kept.workload, kept.budget_bytes, device)
    return places.find(question, [at(str(home / "profiles"))])


def test_what_is_kept_is_found_and_named_for_a_reader(home: Path) -> None:
    path = store.keep(samples.profile())
    assert path.parent == home / "profiles"
    prefix = "StableDiffusionPipeline--NVIDIA-H200--4.00GiB--512x512b1s50--"
    assert path.name.startswith(prefix)
    assert found(home, samples.VERSIONS) == samples.profile()


@pytest.mark.parametrize("package", SOFTWARE)
def test_other_software_does_not_find_it(home: Path, package: str) -> None:
    store.keep(samples.profile())
    assert found(home, samples.VERSIONS | {package: "0"}) is None


def test_another_python_finds_it(home: Path) -> None:
    store.keep(samples.profile())
    assert found(home, samples.VERSIONS | {"python": "3.11.0"}) == samples.profile()


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": samples.measurement(image_s=0.9)},
        {"ladder": samples.travelled().ladder},
        {"evidence": samples.travelled().evidence},
        {"components": samples.travelled().components},
        {"on": samples.travelled().on},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_same_plan_for_the_same_takes_the_place(home: Path, changes: dict[str, Any]) -> None:
    first = store.keep(samples.profile())
    again = samples.profile(**changes)
    assert store.keep(again) == first
    assert store.load(first) == again


@pytest.mark.parametrize(
    "changes",
    [
        {"workload": Workload(512, 512, 50, passes=1)},
        {"plan": samples.SLOW},
        {"fingerprint": "other"},
        {"on": dataclasses.replace(samples.profile().on, versions={})},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_looks_alike_is_kept_apart(home: Path, changes: dict[str, Any]) -> None:
    assert store.keep(samples.profile()) != store.keep(samples.profile(**changes))


class TestWithKept:
    """What came of a profile here counts, whoever sends the profile again."""

    def test_evidence_of_this_folder_goes_before_that_of_the_file(self, home: Path) -> None:
        newer, card = samples.travelled().evidence
        failed = dataclasses.replace(card, on=newer.on)
        store.keep(samples.profile(evidence=(failed,)))
        given = samples.profile(evidence=(newer, card))
        assert store.with_kept(given) == samples.profile(evidence=(card, failed))

    def test_without_a_kept_one_the_profile_is_as_it_was(self, home: Path) -> None:
        store.keep(samples.profile(plan=samples.SLOW, evidence=samples.travelled().evidence))
        assert store.with_kept(samples.profile()) == samples.profile()

    def test_a_kept_file_that_is_spoilt_is_passed_over_with_a_warning(self, home: Path) -> None:
        store.keep(samples.travelled()).write_text("- milk\n")
        with pytest.warns(UserWarning, match=r"passed over: profile .*\.yaml: not a mapping"):
            assert store.with_kept(samples.travelled()) == samples.travelled()


class TestWhy:
    def test_is_read_beside_the_profile_else_from_the_folder(
        self, home: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy.yaml"
        store.save(samples.profile(), copy)
        assert store.load_why(copy) is None
        store.keep_why(store.keep(samples.profile()), {"trials": ["kept"]})
        assert store.load_why(copy) == {"trials": ["kept"]}
        store.keep_why(copy, {"trials": ["beside"]})
        assert store.load_why(copy) == {"trials": ["beside"]}

    def test_that_is_spoilt_is_none(self, home: Path) -> None:
        path = store.keep(samples.profile())
        store.keep_why(path, {})
        path.with_suffix(store.WHY).write_bytes(b"{\xff")
        assert store.load_why(path) is None


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
