"""autofit profiles list | find | push | pull | check."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import samples
import typer
from fsspec.implementations.memory import MemoryFileSystem

from autofit import cli, places, shelf, store
from autofit.places import exchange, remote
from autofit.spec import Profile

PROFILE = samples.profile()
SLOWER = samples.profile(
    plan=samples.SLOW, measured=samples.measurement(image_s=3.0, peak_bytes=2 * samples.GIB)
)
URL = "memory://team/profiles"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AUTOFIT_PROFILES", raising=False)
    MemoryFileSystem.store.clear()
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    store.save(SLOWER, path / "a.yaml")
    store.save(PROFILE, path / "b.yaml")
    return path


def profiles(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``autofit profiles ...``."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main(["profiles", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


def names(*arguments: object) -> list[str]:
    """The files' names that ``autofit profiles ... --json`` lists, without a complaint."""
    code, out, err = profiles(*arguments, "--json")
    assert (code, err) == (0, "")
    return [Path(row["location"]).name for row in json.loads(out)]


@pytest.mark.parametrize("command", ["list", "find", "push", "pull", "check"])
def test_help_names_what_can_be_given_and_says_what_it_is(command: str) -> None:
    group: Any = typer.main.get_command(shelf.app)
    code, out, err = profiles(command, "--help")
    assert (code, err) == (0, "")
    for parameter in group.commands[command].params:
        assert parameter.opts[0] in out
        assert parameter.help


def test_list_shows_every_place_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.keep(PROFILE)
    monkeypatch.setenv("AUTOFIT_PROFILES", str(folder))
    code, out, err = profiles("list")
    assert (code, err) == (0, "")
    user, slower, *_ = out.splitlines()
    shape, card = "512x512, 50 steps", "NVIDIA H200"
    assert re.split(" {2,}", user) == [
        "StableDiffusionPipeline", shape, "4.00 GiB", "0.865 s", "3.42 GiB", card, str(kept)
    ]  # fmt: skip
    assert slower.endswith(str(folder / "a.yaml"))
    assert names("list")[3:] == sorted(path.name for path in places.SHIPPED.glob("*.yaml"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["b.yaml", "a.yaml"]),
        (["--pipeline", "stablediffusion"], ["b.yaml", "a.yaml"]),
        (["--pipeline", "flux"], []),
        (["--size", "512x512", "--gpu", "h200"], ["b.yaml", "a.yaml"]),
        (["--size", "512x768"], []),
        (["--gpu", "rtx-4060"], []),
        (["--budget", "3GiB"], ["a.yaml"]),
    ],
    ids=str,
)
def test_find_filters_the_fastest_first(
    folder: Path, options: list[str], expected: list[str]
) -> None:
    assert names("find", "--from", folder, *options) == expected


def test_it_is_said_where_there_is_none(folder: Path) -> None:
    assert profiles("find", "--from", folder, "--size", "8x8") == (
        0, "", "there is no such profile\n"
    )  # fmt: skip


def test_it_is_said_where_others_measured_on_other_cards(folder: Path) -> None:
    code, out, err = profiles("find", "--from", folder, "--gpu", "rtx-2060-6gb")
    assert (code, out) == (0, "")
    assert re.match(r"autofit: measured on other cards: \d; without --gpu they are listed\n", err)


def test_a_card_of_no_table_is_on_none_of_its_cards(folder: Path) -> None:
    on = replace(PROFILE.on, device="Cerebral Vortex 9")
    store.save(samples.profile(on=on), folder / "c.yaml")
    assert names("find", "--from", folder, "--gpu", "h200") == ["b.yaml", "a.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find", "--size", "big"], "size 'big': not WIDTHxHEIGHT in pixels"),
        (["find", "--budget", "8"], "budget '8' has no unit"),
        (["list", "--from", "/nowhere"], "place /nowhere: cannot be read (No such file"),
        (["list", "--from", "nosuch://a"], "place nosuch://a: cannot read index.json (ValueError:"),
        (["find", "--gpu", "h20000"], "gpu 'h20000' is not in the table"),
        (["push", "missing.yaml", URL], "profile missing.yaml: cannot be read"),
        (["pull", URL], "place memory://team/profiles: cannot read index.json: not found"),
        (["pull", URL, "../a.yaml"], "name '../a.yaml': not a file name of a profile"),
        (["check", "/nowhere"], "place /nowhere: cannot be read (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    code, out, err = profiles(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"autofit: {message}")
    assert err.count("\n") == 1


def test_push_and_pull(folder: Path, home: Path) -> None:
    code, out, err = profiles("push", folder / "b.yaml", URL)
    assert (code, err) == (0, "")
    name = out.strip().removeprefix(f"{URL}/")
    assert names("list", "--from", URL) == [name]
    for arguments in ((URL,), (URL, name)):
        assert profiles("pull", *arguments) == (0, f"{home / 'profiles' / name}\n", "")
    assert store.load(home / "profiles" / name) == PROFILE


def test_pull_refuses_a_bad_profile_and_says_which_field(folder: Path, home: Path) -> None:
    bad = (folder / "a.yaml").read_bytes().replace(b"image_s: 3.0", b"image_s: -1.0")
    remote.write(URL, "bad.yaml", bad)
    code, out, err = profiles("pull", URL, "bad.yaml")
    assert (code, out) == (2, "")
    reason = "measured: image_s must be a time above zero"
    assert err == f"autofit: profile {URL}/bad.yaml: {reason}\n"
    assert not (home / "profiles").exists()


def test_check_names_every_bad_file_and_no_other(folder: Path) -> None:
    good = profiles("check", folder)
    assert good == (0, f"{folder / 'a.yaml'}\n{folder / 'b.yaml'}\n", "")
    (folder / "a.yaml").write_text("a: [1")
    store.save(clashing(), folder / "c.yaml")
    code, out, err = profiles("check", folder)
    assert (code, out) == (2, f"{folder / 'b.yaml'}\n")
    first, second = err.splitlines()
    assert first.startswith(f"autofit: profile {folder / 'a.yaml'}: not YAML: line 1")
    assert second.startswith(f"autofit: profile {folder / 'c.yaml'}: plan: traced: not with ")
    assert profiles("check", folder / "b.yaml") == (0, f"{folder / 'b.yaml'}\n", "")


def clashing() -> Profile:
    """A plan with one technique a slot, of which two do not go together."""
    traced = samples.KINDS["traced"]()
    offload = samples.KINDS["sequential_offload"]()
    return samples.profile(plan=samples.Plan((traced, offload)))


def test_check_of_a_url_reads_what_its_index_lists(folder: Path) -> None:
    exchange.push(folder / "b.yaml", URL)
    (row,) = remote.rows(URL)
    assert profiles("check", URL) == (0, f"{URL}/{row.name}\n", "")
    lies = replace(row, facts=row.facts.replace("0.8653124", "0.1"))
    remote.write(URL, "index.json", remote.listing(URL, [lies]))
    code, _, err = profiles("check", URL)
    assert (code, err) == (
        2, f"autofit: profile {URL}/{row.name}: index.json says otherwise of it\n"
    )  # fmt: skip


def test_a_place_that_cannot_be_reached_does_not_stop_a_list(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOFIT_PROFILES", f"/nowhere {folder}")
    code, out, err = profiles("list")
    assert (code, len(out.splitlines())) == (0, 2 + len(list(places.SHIPPED.glob("*.yaml"))))
    assert err == (
        "autofit: passed over: place /nowhere: cannot be read (No such file or directory): check"
        " the path\n"
    )


def test_a_strangers_text_does_not_reach_the_terminal_as_commands(folder: Path) -> None:
    on = replace(PROFILE.on, device="\x1b[2J\x1b]0;owned\x07H200")
    store.save(samples.profile(on=on), folder / "b.yaml")
    _, out, _ = profiles("list", "--from", folder)
    assert out.isascii()
    assert "?[2J?]0;owned?H200" in out
    assert "\x1b" not in out
