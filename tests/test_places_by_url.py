"""Places behind URLs: read and written through fsspec, never trusted, and missed without harm."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
import samples
from fsspec.implementations.memory import MemoryFileSystem

from autofit import places, store
from autofit.places import Question, at, exchange, index, remote
from autofit.spec import BadInput, Profile

PROFILE = samples.profile()
SLOWER = samples.profile(plan=samples.SLOW, measured=samples.measurement(image_s=3.0))
ASKED = Question(PROFILE.fingerprint, PROFILE.workload, PROFILE.budget_bytes, samples.device())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.fixture
def url() -> Iterator[str]:
    """A place that is no folder: in this process's memory, through fsspec."""
    yield "memory://team/profiles"
    MemoryFileSystem.store.clear()


def saved(profile: Profile, path: Path) -> Path:
    store.save(profile, path)
    return path


def found(*among: str | Path) -> Profile | None:
    return places.find(ASKED, [at(str(place)) for place in among])


def test_what_is_pushed_to_a_url_is_found_listed_and_pulled(
    tmp_path: Path, home: Path, url: str
) -> None:
    path = saved(PROFILE, tmp_path / "mine.yaml")
    location = exchange.push(path, url)
    assert location.startswith(f"{url}/StableDiffusionPipeline--NVIDIA-H200--")
    assert found(url) == PROFILE
    (item,), faults = places.items([at(url)])
    assert (faults, item.place.location(item.name)) == ([], location)
    (pulled,) = exchange.pull(at(url))
    assert Path(pulled.location).parent == home / "profiles"
    assert store.load(pulled.location) == PROFILE


def test_what_the_user_measured_stays_when_a_strangers_is_pulled(tmp_path: Path, url: str) -> None:
    theirs = samples.profile(measured=samples.measurement(image_s=0.1))
    exchange.push(saved(theirs, tmp_path / "theirs.yaml"), url)
    own = store.keep(PROFILE)
    (pulled,) = exchange.pull(at(url))
    assert Path(pulled.location) == own
    assert store.load(own) == PROFILE


def test_without_an_answer_what_was_read_before_still_counts(tmp_path: Path, url: str) -> None:
    exchange.push(saved(PROFILE, tmp_path / "p.yaml"), url)
    assert found(url) == PROFILE
    MemoryFileSystem.store.clear()
    with pytest.warns(UserWarning, match=r"cannot read index\.json: not found"):
        assert found(url) == PROFILE


def test_a_file_that_a_push_at_the_same_moment_left_unlisted_is_listed_by_the_next(
    tmp_path: Path, url: str
) -> None:
    exchange.push(saved(PROFILE, tmp_path / "a.yaml"), url)
    for name, data in (("b.yaml", (tmp_path / "a.yaml").read_bytes()), ("c.yaml", b"- milk")):
        remote.write(url, name, data)
    exchange.push(saved(SLOWER, tmp_path / "s.yaml"), url)
    assert len(remote.rows(url)) == 3
    assert remote.names(url) - {row.name for row in remote.rows(url)} == {"index.json", "c.yaml"}


class Slow(MemoryFileSystem):
    protocol = "slow"

    def _open(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(5)


fsspec.register_implementation("slow", Slow)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("slow://a", r"cannot read index\.json \(TimeoutError: no answer within 0\.2 s\)"),
        ("memory://none", r"cannot read index\.json: not found; autofit profiles push"),
        (
            "nosuch://a",
            r"cannot read index\.json \(ValueError: Protocol not known: nosuch\): write https://",
        ),
        pytest.param(
            "s3://a/b",
            r"needs a package \(.*s3fs.*\): pip install 'autofit\[urls\]'",
            marks=pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is there"),
        ),
    ],
)
def test_a_place_that_cannot_be_reached_is_a_warning(
    folder: Path, address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    saved(PROFILE, folder / "a.yaml")
    with pytest.warns(UserWarning, match=f"passed over: place {address}: {message}"):
        assert found(address, folder) == PROFILE


def listing(**changes: Any) -> dict[str, Any]:
    row = index.Row.of(PROFILE, "a.yaml", b"")
    return json.loads(remote.listing("", [row])) | changes


FILES = listing()["files"]


def lying(**facts: Any) -> dict[str, Any]:
    listed = FILES["a.yaml"]
    return listing(files={"a.yaml": listed | {"entry": listed["entry"] | facts}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it: Invalid JSON"),
        (b"\xff\xfe", "it: Invalid JSON"),
        (b"[" * 2_000_000, "it: Invalid JSON"),
        (b"[]", "it: Input should be an object"),
        (listing(schema=2), "schema: Input should be 1"),
        (listing(files={"../a.yaml": FILES["a.yaml"]}), r"files\.\.\./a\.yaml.*: String should"),
        (listing(files={"/etc/a.yaml": FILES["a.yaml"]}), r"files\./etc.*: String should match"),
        (listing(files={".a.yaml": FILES["a.yaml"]}), r"files\.\.a.*: String should match"),
        (lying(image_s=float("nan")), r"entry\.image_s: Input should be a finite number"),
        (lying(peak_bytes=10**400), r"entry\.peak_bytes: Input should be less than"),
        (lying(workload={"width": 0, "height": 1, "steps": 1}), "width cannot be 0"),
        (lying(fidelity="divine"), r"entry\.fidelity: Input should be 'exact'"),
        (listing(files={"a.yaml": {"sha256": "0" * 64}}), r"files\.a\.yaml\.entry: Field required"),
        (listing(files={f"{n}.yaml": FILES["a.yaml"] for n in range(10_001)}), "at most 10000"),
    ],
)
def test_an_index_that_is_none_is_one_line(url: str, data: Any, message: str) -> None:
    remote.write(url, "index.json", data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(BadInput, match=rf"index\.json is no index of profiles \(.*{message}") as e:
        remote.rows(url)
    assert len(str(e.value)) < 500


def test_a_file_that_is_not_what_the_index_lists_is_passed_over(tmp_path: Path, url: str) -> None:
    location = exchange.push(saved(PROFILE, tmp_path / "p.yaml"), url)
    other = saved(SLOWER, tmp_path / "other.yaml").read_bytes()
    remote.write(url, Path(location).name, other)
    with pytest.warns(UserWarning, match=r"\.yaml: not what index\.json lists: push it anew"):
        assert found(url) is None


def test_no_more_is_read_than_a_profile_may_hold(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.write(url, "a.yaml", bytes(store.MAX_BYTES + 1))
    (read,) = exchange.pull(at(url), "a.yaml")
    assert read.fault == f"{url}/a.yaml: larger than 1.00 MiB"


@pytest.mark.skipif(find_spec("aiohttp") is None, reason="fsspec needs aiohttp for http")
def test_a_folder_behind_a_web_server_is_a_place(tmp_path: Path, folder: Path) -> None:
    exchange.push(saved(PROFILE, tmp_path / "p.yaml"), f"file://{folder}")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert found(address) == PROFILE
        with pytest.raises(BadInput, match=r"cannot write .* \(ClientResponseError: 501"):
            exchange.push(tmp_path / "p.yaml", address)
        server.shutdown()
    with pytest.warns(UserWarning, match=r"cannot read index\.json \(ClientConnectorError"):
        assert found(address) == PROFILE
