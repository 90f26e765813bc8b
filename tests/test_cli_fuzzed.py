"""Whatever is written after ``autofit``, it ends with an exit code and at most one line of error.

No trial is run and no model is loaded here: what would do so refuses instead.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autofit import architectures, cli, session
from autofit.spec import BadInput

ROOT = Path(__file__).parent.parent
COMMANDS: dict[str, Any] = vars(typer.main.get_command(cli.app))["commands"]
SHELF: dict[str, Any] = {f"profiles {n}": c for n, c in COMMANDS["profiles"].commands.items()}
ALL = {name: c for name, c in COMMANDS.items() if name != "profiles"} | SHELF
PLAUSIBLE = (
    "8GB", "1GiB", "100MB", "0GB", "-1GB", "1e400GB", "nanGB", "8", "9" * 400 + "GB", "٣GB",
    "1,5GB", "64x64", "512x512", "0x0", "-8x8", "64x", "x", "9" * 30 + "x8", "4GB,8GB",
    "64x64,128x64", ",",
    "1", "0", "-1", "1.5", "1e9", "inf", "9" * 5000, "10m", "90s", "-1h", "1e999h",
    "cpu", "cuda:99", "cuda:-1", "meta", "float16", "int8", "exact", "lossy", "best",
    "tiny-sd", "tiny-flux", "tiny-ds", "./none", "a/b/c", "rtx-4060", "h200", "rtx",
    "tests/golden/profile-2.yaml", "none.yaml", "tests", "pyproject.toml", "x.png", "", " ", "\0",
    "sqlite://", "x://y", "postgresql:x@y", "no/such.journal", "\ud800", "é", "[red]", "{}", "%s",
    "--", "-", "--json", "--fresh", "--why", "--nonsense", "--help", "-5",
)  # fmt: skip
TEXT = st.one_of(st.sampled_from(PLAUSIBLE), st.text(max_size=12))


def written(command: str) -> st.SearchStrategy[list[str]]:
    """A command with as many arguments as it takes, and options that it has; or with any words."""
    asked = [p.opts for p in ALL[command].params]
    options = [o for opts in asked for o in opts if o.startswith("--")]
    plain = [TEXT for opts in asked if not opts[0].startswith("--")]
    option = st.tuples(st.sampled_from(options), TEXT) if options else st.just(())
    proper = st.tuples(st.tuples(*plain), st.lists(option, max_size=4)).map(
        lambda found: [*found[0], *chain.from_iterable(found[1])]
    )
    words = st.one_of(proper, proper, st.lists(TEXT, max_size=6))
    return words.map(lambda found: [*command.split(), *found])


@pytest.fixture(scope="module", autouse=True)
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of their own, and nothing that takes long."""

    def refused(*_: Any, **__: Any) -> Any:
        raise BadInput("not in this test")

    home = tmp_path_factory.mktemp("fuzzed")
    (home / "tests").symlink_to(ROOT / "tests" / "golden" / "..")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFIT_HOME", str(home / "home"))
        patch.chdir(home)
        patch.setattr(session, "measuring", refused)
        patch.setattr(architectures, "load", refused)
        patch.setattr("autofit.team.Team", refused)
        patch.setattr("autofit.team.Planner", refused)
        patch.setattr("autofit.dryrun.DryRun.__init__", refused)
        patch.setattr("autofit.commands.probe_device", refused)
        patch.setattr("autofit.places.at", refused)  # may be a URL
        yield


@pytest.mark.parametrize("command", ALL)
def test_any_arguments_end_in_an_exit_code_and_one_line(command: str) -> None:
    @settings(
        max_examples=100, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(arguments=written(command))
    def check(arguments: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        code = ended.value.code
        assert code in (0, 1, 2), arguments
        errors = [line for line in err.getvalue().split("\n") if line.startswith("autofit: ")]
        assert bool(errors) == bool(code), arguments
        assert "Traceback" not in err.getvalue(), arguments

    check()
