"""Places that are folders: their order, the lookup, its index, and writers at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import samples

from autofit import places, store
from autofit.places import Place, Question, at, exchange, folders, index
from autofit.spec import BadInput, Fidelity, Profile, Workload

ROOT = Path(__file__).parent.parent
ASKED = Question(
    samples.profile().fingerprint,
    samples.profile().workload,
    samples.profile().budget_bytes,
    samples.device(),
)
SLOWER = samples.profile(plan=samples.SLOW, measured=samples.measurement(image_s=3.0))
PROFILE = samples.profile()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AUTOFIT_PROFILES", raising=False)
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def saved(profile: Profile, path: Path) -> Path:
    store.save(profile, path)
    return path


def with_steps(steps: int) -> Profile:
    return samples.profile(workload=replace(PROFILE.workload, steps=steps))


def found(*among: str | Path, **changes: Any) -> Profile | None:
    return places.find(replace(ASKED, **changes), [at(str(place)) for place in among])


# ---------------------------------------------------------------- which places, in which order


def test_the_places_in_order(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(project / "deep" / "deeper")
    shipped = Place("shipped", str(places.SHIPPED))
    assert places.places() == (shipped,)
    (project / ".autofit").mkdir()
    (home / "profiles").mkdir(parents=True)
    monkeypatch.setenv("AUTOFIT_PROFILES", "https://me:secret@host/p/, file:///team  s3://b/q")
    assert places.places() == (
        Place("project", str(project / ".autofit")),
        Place("user", str(home / "profiles")),
        Place("https://host/p", "https://me:secret@host/p"),
        Place("/team", "/team"),
        Place("s3://b/q", "s3://b/q"),
        shipped,
    )


def test_what_is_shipped_is_read() -> None:
    found, faults = places.items([Place("shipped", str(places.SHIPPED))])
    assert faults == []
    assert {item.name for item in found} == {p.name for p in (ROOT / "profiles").glob("*.yaml")}


def test_the_wheel_has_what_is_shipped(tmp_path: Path) -> None:
    for name in ("autofit", "profiles"):
        copytree(ROOT / name, tmp_path / name, symlinks=True)
    for name in ("pyproject.toml", "README.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as build; build.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/profiles/" in name}
    assert names == {path.name for path in (ROOT / "profiles").glob("*.yaml")}


# ---------------------------------------------------------------- a lookup


def test_what_the_user_keeps_is_found(home: Path) -> None:
    assert places.find(ASKED) is None
    store.keep(PROFILE)
    assert places.find(ASKED) == PROFILE


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "other"},
        {"workload": Workload(512, 512, 50, passes=1)},
        {"budget_bytes": 5 * samples.GIB},
        {"device": samples.device(name="NVIDIA H100")},
        {"device": samples.device(total_bytes=80 * samples.GIB)},
        {"device": samples.device(versions=samples.VERSIONS | {"torch": "0"})},
        {"at_worst": Fidelity.EXACT},
    ],
    ids=str,
)
def test_another_question_does_not_find_it(folder: Path, changes: dict[str, Any]) -> None:
    saved(PROFILE, folder / "a.yaml")
    assert found(folder, **changes) is None


def test_the_fastest_that_fits_is_found(folder: Path) -> None:
    over = samples.measurement(image_s=0.1, peak_bytes=PROFILE.budget_bytes + 1)
    saved(samples.profile(measured=over), folder / "a.yaml")
    saved(SLOWER, folder / "b.yaml")
    saved(PROFILE, folder / "c.yaml")
    assert found(folder) == PROFILE
    assert found(folder, at_worst=Fidelity.EXACT) == SLOWER


def test_the_first_place_answers_and_the_next_are_not_asked(
    folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    saved(SLOWER, folder / "a.yaml")
    assert found(folder, tmp_path / "missing") == SLOWER
    assert not recwarn
    with pytest.warns(UserWarning, match=r"passed over: place .*missing: cannot be read"):
        assert found(tmp_path / "missing", folder) == SLOWER


def test_a_file_that_is_no_profile_is_passed_over_with_a_warning(folder: Path) -> None:
    saved(PROFILE, folder / "a.yaml")
    (folder / "notes.yaml").write_text("- milk\n")
    (folder / "gone.yaml").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.yaml")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"passed over: profile .*notes\.yaml: not a") as told:
            assert found(folder) == PROFILE
        assert len(told) == 1


def test_a_profile_that_says_what_cannot_be_is_passed_over_with_a_warning(folder: Path) -> None:
    on = replace(PROFILE.on, total_bytes=-1)
    saved(samples.profile(on=on), folder / "a.yaml")
    (folder / b"\xff.yaml".decode(errors="surrogateescape")).write_text("no text for a name")
    with pytest.warns(
        UserWarning, match=r"passed over: profile a\.yaml: total_bytes: Input should"
    ):
        assert found(folder) is None


# ---------------------------------------------------------------- the index


def test_a_replaced_a_new_and_a_deleted_file_are_seen(folder: Path) -> None:
    saved(PROFILE, folder / "a.yaml")
    assert found(folder) == PROFILE
    again = samples.profile(measured=samples.measurement(image_s=0.9))
    saved(again, folder / "a.yaml")
    assert found(folder) == again
    saved(PROFILE, folder / "b.yaml")
    assert found(folder) == PROFILE
    (folder / "b.yaml").unlink()
    assert found(folder) == again


def test_a_file_written_over_in_place_never_answers_for_what_it_was(folder: Path) -> None:
    settled(saved(PROFILE, folder / "a.yaml"))
    assert found(folder) == PROFILE
    text = (folder / "a.yaml").read_text().replace("steps: 50", "steps: 7")
    (folder / "a.yaml").write_text(text)
    assert found(folder) is None
    (item,), _ = places.items([at(str(folder))])
    assert item.entry.workload.steps == 7
    assert found(folder, workload=item.entry.workload) == with_steps(7)


def settled(path: Path) -> None:
    """As if the folder had been left alone for a minute."""
    past = time.time() - 60
    os.utime(path.parent, (past, past + 0.5))


@pytest.mark.parametrize("damage", [b"not a database", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_index_is_made_anew(home: Path, folder: Path, damage: bytes) -> None:
    saved(PROFILE, folder / "a.yaml")
    assert found(folder) == PROFILE
    (path,) = home.glob("*.sqlite")
    path.write_bytes(damage)
    assert found(folder) == PROFILE
    assert found(folder) == PROFILE
    assert sqlite3.connect(path).execute("select name from file").fetchall() == [("a.yaml",)]


def test_a_lookup_without_a_user_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "file"))
    saved(PROFILE, folder / "a.yaml")
    assert found(folder) == PROFILE


def test_a_lookup_over_10_000_profiles_takes_less_than_50_ms(folder: Path) -> None:
    copies(10_000, folder)
    settled(folder / "a.yaml")
    facts = index.Row.of(with_steps(987_654), "", b"").facts
    rows = [
        index.Row(name, stamp, "", facts.replace("987654", str(number + 1)))
        for number, (name, stamp) in enumerate(sorted(folders._scan(folder)))
    ]
    index.used(lambda i: i.update(str(folder), rows, ()))  # as if read, which takes 30 s
    took_s = []
    for steps in (17, 5000, 9999, 10_000):
        start = time.perf_counter()
        assert found(folder, workload=with_steps(steps).workload) == with_steps(steps)
        took_s.append(time.perf_counter() - start)
    assert min(took_s[1:]) < 0.05  # the first looks at each file's time


# ---------------------------------------------------------------- writers at once


def push_many(paths: list[Path], folder: Path) -> None:
    for path in paths:
        exchange.push(path, str(folder))


def test_eight_writers_of_which_one_is_killed_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    lean = samples.measurement(step_s=(), runs_s=(), phase_peak_bytes={})
    shared, made = tmp_path / "shared", copies(500, tmp_path / "made", measured=lean)
    shares = [range(first, 501, 8) for first in range(1, 9)]
    fork = multiprocessing.get_context("fork")  # torch is imported once
    writers = [
        fork.Process(target=push_many, args=([made[steps] for steps in share], shared))
        for share in shares
    ]
    for writer in writers:
        writer.start()
    wait_for(lambda: len(list(shared.glob("*.yaml"))) > 100)
    assert writers[0].pid is not None
    os.kill(writers[0].pid, signal.SIGKILL)
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [-signal.SIGKILL] + [0] * 7
    push_many([made[1]], shared)  # no lock of the killed one has stayed

    read = list(exchange.check(at(str(shared))))
    assert [r.fault for r in read if r.profile is None] == []
    steps = {r.profile.workload.steps for r in read if r.profile is not None}
    assert len(steps) == len(read)
    assert steps >= set(range(1, 501)) - set(shares[0])
    assert {row["entry"]["workload"]["steps"] for row in listed(shared).values()} == steps


def copies(count: int, folder: Path, **changes: Any) -> dict[int, Path]:
    """Files of profiles for 1, 2, ... steps, made as text: writing YAML takes 4 ms each."""
    profile = replace(with_steps(987_654), **changes)
    text = saved(profile, folder / "one.yaml").read_text()
    (folder / "one.yaml").unlink()
    paths = {steps: folder / f"{steps:05}.yaml" for steps in range(1, count + 1)}
    for steps, path in paths.items():
        path.write_text(text.replace("987654", str(steps)))
    return paths


def listed(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "index.json").read_text())["files"])


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_place_that_cannot_be_written_to_is_bad_input(tmp_path: Path) -> None:
    path = saved(PROFILE, tmp_path / "p.yaml")
    with pytest.raises(BadInput, match=r"place .*p\.yaml: cannot be written to"):
        exchange.push(path, str(path))
