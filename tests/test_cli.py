"""The command line on real pipelines: what it prints where, and how it ends."""

from __future__ import annotations

import getpass
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import typer
import yaml
from PIL import Image

from autofit import __version__, cli, session, store
from autofit.architectures import names
from autofit.gpus import gpus
from autofit.spec import SOFTWARE
from autofit.techniques import KINDS
from autofit.trial.generation import PROMPT

ROOT = Path(__file__).parent.parent
COMMANDS: dict[str, Any] = vars(typer.main.get_command(cli.app))["commands"]
PLAN = ("plan", "tiny-sd", "--device", "cpu", "--budget", "1GB")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """What it says of an error: its last line on stderr, and nothing after or like it."""
        *before, last = self.err.splitlines()
        assert last.startswith("autofit: ")
        assert not any(re.search(r"^autofit: |Traceback|Error", line) for line in before)
        assert self.out == ""
        return last.removeprefix("autofit: ")


def autofit(*arguments: str) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cli")
        patch.setenv("AUTOFIT_HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def profile(home: Path) -> Path:
    """The profile that ``planned`` writes."""
    return home / "profile.yaml"


@pytest.fixture(scope="module")
def planned(profile: Path) -> Ended:
    return autofit(*PLAN, "--batch", "2", "--trials", "2", "--output", str(profile), "--json")


# ---------------------------------------------------------------- plan


class TestPlan:
    def test_json_is_alone_on_stdout(self, planned: Ended, profile: Path) -> None:
        assert planned.code == 0
        found = json.loads(planned.out)
        assert {"profile", "path", "trials"} <= set(found)
        assert found["profile"]["workload"] == {
            "width": 64, "height": 64, "steps": 4, "batch": 2, "frames": 1, "passes": 2,
        }  # fmt: skip
        assert found["profile"]["budget_bytes"] == 10**9
        assert [t["number"] for t in found["trials"]] == list(range(1, len(found["trials"]) + 1))
        assert store.load(found["path"]).plan == store.load(profile).plan
        assert store.load(profile).measured.verified

    def test_progress_is_on_stderr(self, planned: Ended) -> None:
        lines = planned.err.splitlines()
        assert lines[0] == "loading tiny-sd in a worker on cpu"
        assert re.fullmatch(r"\d+ legal plans for StableDiffusionPipeline on .+", lines[1])
        first = json.loads(planned.out)["trials"][0]["label"]
        assert re.fullmatch(rf"  1 +[\d.]+ m?s +[\d.]+ MiB  {re.escape(first)}", lines[2])
        assert "verifying in full, twice, under the cap" in lines
        assert re.fullmatch(r"\d trials, planned in .+", lines[-1])

    def test_without_json_the_profile_is_told(self, planned: Ended, home: Path) -> None:
        # the same again: the study resumes, so that one more trial is all it takes
        again = autofit(*PLAN, "--batch", "2", "--trials", "1", "--fidelity", "lossy")
        assert again.code == 0
        assert again.out.startswith("pipeline  StableDiffusionPipeline, 64x64, 4 steps, batch 2, ")
        kept = Path(again.out.splitlines()[-1].removeprefix("profile").strip())
        assert kept.parent == home / "profiles"
        assert store.load(kept).budget_bytes == 10**9
        before = [t["label"] for t in json.loads(planned.out)["trials"]]
        tried = [t["label"] for t in store.load_why(kept)["trials"]]
        assert tried[: len(before)] == before
        assert len(set(tried)) == len(tried)

    def test_a_budget_too_small_is_exit_3_and_names_one_that_does(self) -> None:
        ended = autofit("plan", "tiny-sd", "--device", "cpu", "--budget", "1MB")
        assert ended.code == 3
        assert re.fullmatch(
            r"none of \d+ plans fits 976\.56 KiB \(0\.001 GB\); the smallest needs [\d.]+ MiB:"
            r" try --budget \d+MB",
            ended.complaint,
        )

    @pytest.mark.slow  # test_planner.py has one, in this process
    def test_a_database_keeps_the_study(self, tmp_path: Path) -> None:
        asked = (*PLAN, "--trials", "1", "--json", "--storage", f"sqlite:///{tmp_path}/studies.db")
        first, second = (json.loads(autofit(*asked).out)["trials"] for _ in range(2))
        assert second[:1] == first
        assert len(second) == 2


class TestPrivacy:
    """A profile is made to be shared: what it says is of the model, the plan and the machine."""

    @pytest.fixture(scope="class")
    def text(self, planned: Ended, profile: Path) -> str:
        return profile.read_text("utf-8")

    def test_no_path_is_in_a_profile(self, text: str) -> None:
        assert not re.search(r"[/\\~]", text)

    def test_no_name_of_user_or_host_is_in_a_profile(self, text: str) -> None:
        names = {getpass.getuser(), Path.home().name, platform.node()} - {"", "localhost"}
        assert names
        for name in names:
            assert not re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)

    def test_no_prompt_is_in_a_profile(self, text: str) -> None:
        words = set(re.findall(r"[a-z]+", text.lower()))
        assert words.isdisjoint(set(re.findall(r"[a-z]{4,}", PROMPT)))

    def test_a_profile_has_no_other_text_than_these(self, text: str) -> None:
        """Every text that is not a number stands where the format says what it is."""
        found = yaml.safe_load(text)
        free = {
            *found["on"]["versions"].values(),
            *(part[key] for part in found["pipeline"]["components"] for key in part),
        }
        named = {
            found["pipeline"]["cls"], found["pipeline"]["fingerprint"], found["on"]["device"],
            found["on"]["cap"], found["measured"]["reference"],
        }  # fmt: skip
        plans = [found["plan"], *(rung["plan"] for rung in found.get("ladder", []))]
        settings = {value for plan in plans for entry in plan for value in entry.values()}
        rungs = {rung["measured"]["reference"] for rung in found.get("ladder", [])}
        assert set(texts(found)) <= free | named | settings | rungs
        assert set(found["on"]["versions"]) <= {*SOFTWARE, "python", "autofit"}


def texts(data: Any) -> Iterator[str]:
    """All texts in plain data that are not keys."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict | list):
        for item in data.values() if isinstance(data, dict) else data:
            yield from texts(item)


# ---------------------------------------------------------------- Ctrl-C


def read_until(stream: Any, pattern: str) -> list[str]:
    lines = []
    for line in stream:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError(f"no line like {pattern!r} in {''.join(lines)}")


def test_ctrl_c_keeps_the_study_and_the_same_command_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "autofit", *PLAN, "--trials", "3", "--json"]
    setting: dict[str, Any] = {
        "cwd": ROOT,
        "env": {**os.environ, "AUTOFIT_HOME": str(tmp_path)},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    # whoever runs the tests in the background has SIGINT ignored, and children inherit that
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, **setting, **heard) as run:
        assert run.stderr is not None
        first = read_until(run.stderr, r"^ +1 .* resident$")[-1].partition("MiB  ")[-1].strip()
        workers = psutil.Process(run.pid).children(recursive=True)
        assert any("autofit.lifeline" in w.cmdline() for w in workers)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert Ended(130, out, err).complaint == "interrupted; the same command resumes"
    assert psutil.wait_procs(workers, timeout=10)[1] == []

    again = subprocess.run(command, timeout=120, check=False, **setting)
    assert again.returncode == 0
    labels = [trial["label"] for trial in json.loads(again.stdout)["trials"]]
    assert labels[0] == first
    assert len(set(labels)) == len(labels)
    # tried before: not tried again
    assert not re.search(rf"MiB  {re.escape(first)}$", again.stderr, re.MULTILINE)


def test_ctrl_c_outside_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "measuring", interrupted)
    ended = autofit(*PLAN)
    assert ended.code == 130
    assert ended.complaint == "interrupted; the same command resumes"


def test_ctrl_c_of_another_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "load", interrupted)
    ended = autofit("show", "profile.yaml")
    assert (ended.code, ended.complaint) == (130, "interrupted")


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "8"), r"budget '8' has no unit; write 8GB \(.+\) or 8GiB \(.+\)"),
        (("--budget", "8 parsecs"), r"budget '8 parsecs': unknown unit 'parsecs'; write 8GB .+"),
        (("--budget", "-1GB"), r"budget '-1GB' is not above zero; write for example 8GB"),
        (("--budget", "0GB"), r"budget '0GB' is not above zero; write for example 8GB"),
        (("--budget", "1GB", "--size", "big"), r"size 'big': not WIDTHxHEIGHT in pixels; .+"),
        (("--budget", "1GB", "--size", ""), r"size '': not WIDTHxHEIGHT in pixels; .+"),
        (("--budget", "1GB", "--batch", "0"), r"batch 0 is below 1; write .* --batch 1"),
        (("--budget", "1GB", "--steps", "few"), r"steps 'few': not a whole number; .+"),
        (("--budget", "1GB", "--trials", "0"), r"trials 0 is below 1; .+"),
        (("--budget", "1GB", "--timeout", "soon"), r"duration 'soon': not a time above zero; .+"),
        (("--budget", "1GB", "--fidelity", "nice"), r"fidelity 'nice': one of exact, .+"),
        (("--budget", "1GB", "--device", "tpu"), r"device 'tpu': not a device; write .+"),
        (("--budget", "1GB", "--output", "no/x.yaml"), r"output .+: there is no folder 'no'"),
        (("--budget", "1GB", "--output", "."), r"output '.' is a folder; give a file in it"),
        (("--device", "cpu"), r"budget: cpu has no card to fill; give one, as --budget 8GB"),
        (
            ("--budget", "1GB", "--storage", "nonsense"),
            r"storage 'nonsense': .+; write as sqlite.+",
        ),
        (
            ("--budget", "1GB", "--storage", "postgresql://ada:secret@127.0.0.1:1/x"),
            r"storage 'postgresql\.\.\.': (?!.*(ada|secret)).+; write as sqlite:///.+",
        ),
        (("--budget", "1GB", "--memory", "8"), r"No such option: --memory.*"),
        pytest.param(
            ("--budget", "1GB", "--device", "cuda:0"),
            r"device 'cuda:0': torch sees 0 CUDA devices here; --device cpu works",
            marks=needs_no_gpu,
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    device = () if "--device" in arguments else ("--device", "cpu")
    ended = autofit("plan", "tiny-sd", *device, *arguments)
    assert ended.code == 2
    assert re.fullmatch(message, ended.complaint), ended.complaint
    assert len(ended.err.splitlines()) == 1  # found out before anything is loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*PLAN, "--size", "1000x1001"),
            r"size 1000x1001: .+ needs multiples of 8 pixels; the nearest is 1000x1000",
        ),
        (
            ("plan", "tiny-ds", "--device", "cpu", "--budget", "1GB"),
            r"model 'tiny-ds' is not built in\. Did you mean tiny-sd\?.+",
        ),
    ],
)
def test_what_the_worker_or_the_pipe_refuses_is_one_line(
    arguments: tuple[str, ...], message: str
) -> None:
    ended = autofit(*arguments)
    assert ended.code == 2
    assert re.fullmatch(message, ended.complaint), ended.complaint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plam",), r"No such command 'plam'\..*"),
        (("plan",), r"Missing argument 'model' \(see autofit plan --help\)"),
        (("profiles",), r"Missing command \(see autofit profiles --help\)"),
        (("probe", "--device", "tpu"), r"device 'tpu': not a device; .+"),
        (("show",), r"Missing argument .+"),
    ],
)
def test_what_is_no_command_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    ended = autofit(*arguments)
    assert ended.code == 2
    assert re.fullmatch(message, ended.complaint), ended.complaint
    assert len(ended.err.splitlines()) == 1


# ---------------------------------------------------------------- a profile's file


def _without_fingerprint(text: str) -> str:
    return re.sub(r"  fingerprint: .+\n", "", text)


SPOILT: dict[str, tuple[Callable[[str], str], str]] = {
    "not YAML": (lambda _: "{", r"profile .+: not YAML: .+"),
    "not a profile": (lambda _: "- 1\n", r"profile .+: not a mapping of .+"),
    "of a later schema": (
        lambda text: text.replace("schema: 2", "schema: 3"),
        r"profile .+: schema 3 is newer than this autofit reads \(2\): upgrade autofit",
    ),
    "without a field": (
        _without_fingerprint,
        r"profile .+: missing field pipeline\.fingerprint: add it, or plan anew",
    ),
}


def given(command: str, path: Path) -> tuple[str, ...]:
    if command == "show":
        return ("show", str(path))
    image = str(path.with_name("image.png"))
    return ("run", "tiny-sd", "--device", "cpu", "--profile", str(path), "--prompt", "x",
            "--output", image)  # fmt: skip


@pytest.mark.parametrize("command", ["show", "run"])
class TestSpoiltProfile:
    @pytest.mark.parametrize("fault", SPOILT)
    def test_is_refused_in_one_line(
        self, command: str, fault: str, planned: Ended, profile: Path, tmp_path: Path
    ) -> None:
        spoil, message = SPOILT[fault]
        path = tmp_path / "spoilt.yaml"
        path.write_text(spoil(profile.read_text()))
        ended = autofit(*given(command, path))
        assert ended.code == 2
        assert re.fullmatch(message, ended.complaint), ended.complaint
        assert len(ended.err.splitlines()) == 1

    def test_that_is_not_there(self, command: str, tmp_path: Path) -> None:
        ended = autofit(*given(command, tmp_path / "none.yaml"))
        assert ended.code == 2
        assert re.fullmatch(r"profile .+none\.yaml: cannot be read \(.+\): .+", ended.complaint)


class TestShow:
    def test_says_what_the_plan_does_and_costs(self, planned: Ended, profile: Path) -> None:
        ended = autofit("show", str(profile))
        assert (ended.code, ended.err) == (0, "")
        assert {"pipeline", "plan", "peak", "time", "measured", "versions"} <= {
            line.split(" ")[0] for line in ended.out.splitlines()
        }

    def test_why_lists_the_trials_and_what_was_not_tried(
        self, planned: Ended, profile: Path
    ) -> None:
        ended = autofit("show", str(profile), "--why")
        assert ended.code == 0
        lines = ended.out.splitlines()
        tried = lines[lines.index("tried") + 1 : lines.index("not tried")]
        labels = [t["label"] for t in json.loads(planned.out)["trials"]]
        assert [line.strip().split(": ")[0] for line in tried][: len(labels)] == labels
        assert any("64x64 is one tile of 512 px" in line for line in lines)
        assert any("of what this device can do within the budget" in line for line in lines)

    def test_json(self, planned: Ended, profile: Path) -> None:
        shown = json.loads(autofit("show", str(profile), "--json").out)
        assert shown == json.loads(planned.out)["profile"]
        with_why = json.loads(autofit("show", str(profile), "--why", "--json").out)
        assert with_why["profile"] == shown
        assert set(with_why["why"]) == {"limit_s", "break_even", "trials", "ruled_out"}
        assert with_why["why"]["limit_s"] > 0
        # of the latest study that found this plan
        kept = Path(json.loads(planned.out)["path"]).with_suffix(store.WHY)
        assert with_why["why"] == json.loads(kept.read_text("utf-8"))

    def test_why_of_a_profile_from_elsewhere(self) -> None:
        ended = autofit("show", str(ROOT / "tests/golden/profile-1.yaml"), "--why")
        assert ended.code == 2
        assert ended.complaint.endswith("not on this machine; plan here to see them")


class TestRun:
    def test_writes_an_image_for_each_of_the_batch(
        self, planned: Ended, profile: Path, tmp_path: Path
    ) -> None:
        ended = autofit(
            "run", "tiny-sd", "--device", "cpu", "--profile", str(profile),
            "--prompt", "x", "--output", str(tmp_path / "img.png"),
        )  # fmt: skip
        assert ended.code == 0, ended.err
        paths = [tmp_path / "img-0.png", tmp_path / "img-1.png"]
        assert ended.out.splitlines() == list(map(str, paths))
        images = [np.asarray(Image.open(path)) for path in paths]
        assert [image.shape for image in images] == [(64, 64, 3)] * 2
        assert not np.array_equal(*images)

    def test_writes_one_image_of_the_size_asked(
        self, planned: Ended, profile: Path, tmp_path: Path
    ) -> None:
        found = yaml.safe_load(profile.read_text())
        found["workload"] |= {"width": 128, "batch": 1}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(found))
        asked = given("run", tmp_path / "one.yaml")
        first = autofit(*asked)
        assert first.code == 0, first.err
        assert first.out == f"{tmp_path / 'image.png'}\n"
        pixels = np.asarray(Image.open(tmp_path / "image.png"))
        assert pixels.shape == (64, 128, 3)
        assert autofit(*asked, "--seed", "1").code == 0
        assert not np.array_equal(pixels, np.asarray(Image.open(tmp_path / "image.png")))

    def test_a_profile_for_another_pipeline(self, planned: Ended, profile: Path) -> None:
        asked = ("--profile", str(profile), "--prompt", "x", "--output", "x.png")
        ended = autofit("run", "tiny-flux", "--device", "cpu", *asked)
        assert ended.code == 2
        assert ended.complaint == (
            "the profile does not hold here: it is for StableDiffusionPipeline, this pipe is a"
            " FluxPipeline: plan here with autofit plan"
        )
        ended = autofit("run", "tiny-sd", "--device", "cpu", "--dtype", "float16", *asked)
        assert ended.code == 2
        assert re.search(
            r"another StableDiffusionPipeline \(\w+ is float32 in the profile, float16 here\)",
            ended.complaint,
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (("--output", "no/x.png"), r"output 'no/x.png': there is no folder 'no'"),
            (("--output", "x.yaml"), r"image x\.yaml: '\.yaml' is no image format; .+"),
            (("--device", "tpu"), r"device 'tpu': not a device; .+"),
            (("--seed", "-1"), r"seed -1 is below 0; .+"),
            (("--seed", "9" * 20), r"seed 9+ is above 9223372036854775807; .+"),
        ],
    )
    def test_is_refused_before_the_model_is_loaded(
        self, changes: tuple[str, ...], message: str, planned: Ended, profile: Path
    ) -> None:
        # of an option that is given twice the last counts
        ended = autofit(*given("run", profile), *changes)
        assert ended.code == 2
        assert re.fullmatch(message, ended.complaint), ended.complaint
        assert len(ended.err.splitlines()) == 1


# ---------------------------------------------------------------- the rest


class TestProbe:
    def test_table(self) -> None:
        ended = autofit("probe", "--device", "cpu")
        assert (ended.code, ended.err) == (0, "")
        assert "memory bandwidth" in ended.out
        assert "float32 products" in ended.out

    def test_json(self) -> None:
        found = json.loads(autofit("probe", "--device", "cpu", "--json").out)
        assert found["kind"] == "cpu"
        assert found["versions"]["torch"] == torch.__version__

    def test_a_card_of_the_table_says_that_it_is_one(self) -> None:
        ended = autofit("probe", "--gpu", "RTX 4060")
        assert (ended.code, ended.err) == (0, "")
        assert "NVIDIA GeForce RTX 4060" in ended.out
        assert re.search(r"source .+ GPU table", ended.out)

    def test_a_card_of_the_table_as_json(self) -> None:
        found = json.loads(autofit("probe", "--gpu", "rtx-4060", "--json").out)
        assert found["name"] == "NVIDIA GeForce RTX 4060"
        assert found["capability"] == [8, 9]
        assert found["versions"]["source"].startswith("GPU table")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--gpu", "rtx-4600"), r"gpu 'rtx-4600' is not in the table\. Did you mean .+"),
            (("--gpu", "rtx-4060", "--device", "cpu"), r"gpu 'rtx-4060' is looked up, .+"),
            (("--gpu", "rtx-4060", "--fresh"), r"gpu 'rtx-4060' is looked up, .+"),
        ],
    )
    def test_what_cannot_be_looked_up(self, arguments: tuple[str, ...], message: str) -> None:
        ended = autofit("probe", *arguments)
        assert ended.code == 2
        assert re.fullmatch(message, ended.complaint), ended.complaint


class TestGpus:
    def test_are_listed(self) -> None:
        lines = autofit("gpus").out.splitlines()
        assert [line.split()[0] for line in lines] == [g.slug for g in gpus()]

    def test_json(self) -> None:
        found = json.loads(autofit("gpus", "--json").out)
        assert [g["slug"] for g in found] == [g.slug for g in gpus()]
        assert all(g["source"] for g in found)


class TestModels:
    def test_are_listed(self) -> None:
        lines = autofit("models").out.splitlines()
        assert [line.split()[0] for line in lines] == list(names())

    def test_json(self) -> None:
        found = json.loads(autofit("models", "--json").out)
        assert [a["name"] for a in found] == list(names())
        assert found[0]["parameters"] == 1_475_291


class TestHelp:
    def test_without_a_command(self) -> None:
        assert autofit() == autofit("--help")
        ended = autofit("--help")
        assert (ended.code, ended.err) == (0, "")
        for command in COMMANDS:
            assert re.search(rf"^  {command} +\S", ended.out, re.MULTILINE)

    @pytest.mark.parametrize("command", [(), ("plan",), ("profiles", "find")])
    def test_is_asked_for_in_short(self, command: tuple[str, ...]) -> None:
        assert autofit(*command, "-h") == autofit(*command, "--help")

    def test_says_its_version(self) -> None:
        ended = autofit("--version")
        assert (ended.code, ended.out, ended.err) == (0, f"autofit {__version__}\n", "")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_names_every_option_and_says_what_it_is(self, command: str) -> None:
        ended = autofit(command, "--help")
        assert (ended.code, ended.err) == (0, "")
        for parameter in COMMANDS[command].params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in ended.out
                assert parameter.help

    def test_of_the_module(self) -> None:
        run = [sys.executable, "-m", "autofit", "models", "--json"]
        ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        assert ended.stderr == ""
        assert len(json.loads(ended.stdout)) == len(names())

    def test_interrupted_while_it_is_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")  # as Ctrl-C does
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        ended = subprocess.run(
            [sys.executable, "-m", "autofit", "models"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout) == (130, "")
        assert ended.stderr == "autofit: interrupted\n"


@pytest.fixture(scope="module")
def readme() -> str:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("there is no README.md yet")
    return path.read_text("utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_shows_every_command(command: str, readme: str) -> None:
    assert f"autofit {command}" in readme


def test_the_readme_s_promises_name_tests_and_scripts_that_are_there(readme: str) -> None:
    _, _, after = readme.partition("## What we promise and how it is tested")
    rows = [line for line in after.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 15
    for row in promises:
        assert len(row.split("|")) == 5, row
        named = re.findall(r"`(test_[\w*]+\.py)`", row)
        named += re.findall(r"scripts/\w+\.py", row)
        assert named, row
        for name in named:
            assert any(ROOT.glob(name if "/" in name else f"tests/{name}")), name


@pytest.mark.parametrize("technique", KINDS)
def test_the_readme_names_every_technique(technique: str, readme: str) -> None:
    assert re.search(rf"\b{technique}\b", readme)
