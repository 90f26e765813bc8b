"""autofit probe | plan | run | show | verify | profiles | models | gpus. Parses, calls, prints.

Results go to stdout, progress and tables to stderr: ``autofit plan ... --json | jq`` works. An
error is one line of stderr.
Exit code 0: done; 1: a fault of ours or of the machine; 2: bad input; 3: nothing fits;
130: interrupted.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from autofit import __version__, child, shelf, units
from autofit.interrupts import INTERRUPTED
from autofit.spec import AutofitError, BadInput

MOST_SEED = 2**63 - 1  # that torch takes, with one more for each image of a batch

app = typer.Typer(
    name="autofit",
    help="Fit a diffusers pipeline into a memory budget: find, measure and apply the fastest plan.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shelf.app, name="profiles")

Model = Annotated[str, typer.Argument(help="A built-in model, a local folder, or a Hub id.")]
Device = Annotated[
    str | None, typer.Option(help="cuda:0 or cpu; the first GPU where there is one.")
]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON to stdout.")]
Dtype = Annotated[
    str | None, typer.Option(help="Load the weights as float32, float16 or bfloat16.")
]
Fidelity = Annotated[
    str, typer.Option(help="The least faithful plan allowed: exact, numeric or lossy.")
]
Images = Annotated[
    str, typer.Option(help="Spread the time to set up (compiling) over this many images.")
]
Storage = Annotated[
    str | None,
    typer.Option(help="Share a study: a database's URL, or FILE.journal. The user's own if none."),
]
HostRam = Annotated[str | None, typer.Option(help="Host memory at most, as 16GB.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"autofit {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say which it is."),
    ] = False,
) -> None: ...


@app.command()
def plan(
    model: Model,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Memory of the whole process, as 8GB, or several, as 12GB,8GB,6GB; if none, the"
            " card's less a desktop's."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's own if none.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Images a call.")] = "1",
    steps: Annotated[
        str | None, typer.Option(help="Denoising steps; the model's own if none.")
    ] = None,
    frames: Annotated[str, typer.Option(help="Frames, of a video pipeline.")] = "1",
    fidelity: Fidelity = "lossy",
    host_ram: HostRam = None,
    device: Device = None,
    dtype: Dtype = None,
    trials: Annotated[str, typer.Option(help="At most this many trials a budget.")] = "40",
    timeout: Annotated[
        str, typer.Option(help="Search a budget no longer, as 90s, 10m or 1h.")
    ] = "10m",
    images: Images = "20",
    storage: Storage = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier trials.")] = False,
    workers: Annotated[
        str,
        typer.Option(help="Use this many GPUs at once: for one search, or a budget each."),
    ] = "1",
    output: Annotated[Path | None, typer.Option(help="Write the profile here too.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Predict for a card of the table (`autofit gpus`).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Predict, without trials and without weights.")
    ] = False,
    budgets: Annotated[
        str | None, typer.Option(help="Predict a table for these, as 4GB,8GB,16GB.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Predict a table for these, as 512x512,1024x1024.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan within the budget by short trial generations, and store its profile.

    Several budgets are planned from the largest on, each by what was tried before it.

    With --dry-run, --gpu, --budgets or --sizes it is predicted instead, in seconds and without a
    GPU: what would fit, and how fast.
    """
    from autofit import goals

    def goal_of(budget: str | int, size: str | None) -> goals.Goal:
        return goals.Goal(
            budget=budget,
            size=units.parse_pixels(size) if size is not None else None,
            batch=_count("batch", batch),
            steps=_count("steps", steps) if steps is not None else None,
            frames=_count("frames", frames),
            fidelity=fidelity,
            host_ram=host_ram,
        )

    _check_folder(output)
    searched: dict[str, Any] = {
        "trials": _count("trials", trials),
        "timeout_s": units.parse_duration(timeout),
        "images": _count("images", images),
    }
    others = _count("workers", workers)
    if dry_run or gpu is not None or budgets is not None or sizes is not None:
        if gpu is not None and device is not None:
            raise BadInput(f"gpu {gpu!r} is predicted, not used: leave out --device, or --gpu")
        from autofit import predicting

        asked = predicting.Asked(
            goal_of,
            budgets=_either("budget", budget, budgets),
            sizes=_either("size", size, sizes),
            is_table=budgets is not None or sizes is not None,
        )
        predicting.predict(model, asked, gpu, device, dtype, output, as_json)
        return
    texts = [] if budget is None else _listed(budget, output) if "," in budget else [budget]
    # Without a budget it is the card's, which is not known yet; all else is checked now.
    wanted = [goal_of(text, size) for text in texts] or [goal_of(1, size)]
    several = len(wanted) > 1
    host_ram_bytes = wanted[0].host_ram_bytes
    own = nullcontext() if several and others > 1 else child.begun(host_ram_bytes, others)
    with own as worker:
        from autofit import commands, planner

        effort = planner.Effort(**searched, storage=storage, fresh=fresh)
        if several:
            from autofit.budgets import plan as plan_each

            plan_each(model, wanted, effort, device, dtype, as_json, others, worker)
            return
        goal = wanted[0] if texts else replace(wanted[0], budget=commands.whole_card(device))
        commands.plan(model, goal, effort, device, dtype, output, as_json, others, worker)


@app.command()
def probe(
    device: Device = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="Show a card of the table instead (`autofit gpus` lists it)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine: memory, bus, matrix rates, attention kernels that answer, versions."""
    if gpu is not None and (device is not None or fresh):
        raise BadInput(
            f"gpu {gpu!r} is looked up, not measured: leave out --device and --fresh, or --gpu"
        )
    from autofit import commands

    if gpu is not None:
        commands.look_up(gpu, as_json)
    else:
        commands.probe(device, fresh, as_json)


@app.command()
def run(
    model: Model,
    profile: Annotated[Path, typer.Option(help="The profile to apply.")],
    prompt: Annotated[str, typer.Option(help="What to make an image of.")],
    output: Annotated[Path, typer.Option(help="The PNG file to write.")],
    seed: Annotated[str, typer.Option(help="Of the initial noise.")] = "0",
    host_ram: HostRam = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Apply a profile and make its images."""
    from autofit import commands

    _check_folder(output)
    noise = _count("seed", seed, 0, MOST_SEED)
    commands.run(model, profile, prompt, output, noise, host_ram, device, dtype)


@app.command()
def show(
    profile: Annotated[Path, typer.Argument(help="A profile's file.")],
    why: Annotated[
        bool,
        typer.Option("--why", help="Also the trials, and why other techniques were not tried."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a profile does, what it costs, and where that was measured."""
    from autofit import commands

    commands.show(profile, why, as_json)


@app.command()
def verify(
    profile: Annotated[Path, typer.Argument(help="A profile's file.")],
    model: Annotated[
        str | None,
        typer.Argument(help="The model that it is for, where that is not a built-in one."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    gpu: Annotated[
        str | None, typer.Option(help="Predict for a card of the table instead (`autofit gpus`).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the profile here, not in its place.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a profile's plan on this machine and add what came of it to the profile."""
    if gpu is not None and (device is not None or output is not None):
        raise BadInput(
            f"gpu {gpu!r} is predicted, not measured: leave out --device and --output, or --gpu"
        )
    from autofit import verifying

    _check_folder(output)
    if gpu is not None:
        verifying.predict(profile, model, gpu, dtype, as_json)
    else:
        verifying.verify(profile, model, device, dtype, output, as_json)


@app.command()
def models(as_json: Json = False) -> None:
    """List the built-in models: published shapes with random weights, made offline."""
    from autofit.architectures import ARCHITECTURES

    if as_json:
        typer.echo(json.dumps([vars(a) for a in ARCHITECTURES], indent=2))
        return
    for a in ARCHITECTURES:
        size = f"{a.width}x{a.height}"
        typer.echo(
            f"{a.name:<14}{a.parameters / 1e9:7.3f} B  {a.dtype:<9} {size:>9}, {a.steps:>2} steps"
            f"  {a.summary}"
        )


@app.command()
def gpus(as_json: Json = False) -> None:
    """List the cards that --gpu takes and nobody need have, by their vendor's figures."""
    from autofit.gpus import gpus as cards

    if as_json:
        typer.echo(json.dumps([vars(g) for g in cards()], indent=2))
        return
    for g in cards():
        rate = g.fp16_flops_s
        half = "no tensor cores" if rate is None else f"{rate / 1e12:.4g} TFLOP/s"
        typer.echo(
            f"{g.slug:<22}{g.memory_bytes / units.GIB:4.0f} GiB {g.memory_bytes_s / 1e9:5.0f} GB/s"
            f"  PCIe {g.pcie}.0 x{g.lanes:<2} {half:>15}  {g.name}"
        )


def _count(name: str, text: str, least: int = 1, most: float = math.inf) -> int:
    try:
        number = int(text)
    except ValueError:
        raise BadInput(
            f"{name} {text!r}: not a whole number; write for example --{name} 1"
        ) from None
    if number < least:
        raise BadInput(
            f"{name} {number} is below {least}; write for example --{name} {max(1, least)}"
        )
    if number > most:
        raise BadInput(f"{name} {number} is above {most}; write for example --{name} 1")
    return number


def _either(name: str, one: str | None, many: str | None) -> list[str | None]:
    if one is not None and many is not None:
        raise BadInput(f"give --{name} or --{name}s, not both")
    if one is not None and "," in one:
        raise BadInput(f"{name} {one!r} is several: to predict a table write --{name}s {one}")
    return [one] if many is None else [text.strip() for text in many.split(",")]


def _listed(budget: str, output: Path | None) -> list[str]:
    """The budgets of a list."""
    texts = [text.strip() for text in budget.split(",")]
    if not all(texts):
        raise BadInput(f"budget {budget!r}: one of the list is empty; write for example 8GB,4GB")
    if output is not None:
        raise BadInput(
            f"output {str(output)!r} is for one budget, not for {budget}: leave it out; the paths"
            " of all profiles are told"
        )
    return texts


def _check_folder(output: Path | None) -> None:
    """Before minutes of work: a result that cannot be written is found out now."""
    if output is not None and not output.parent.is_dir():
        raise BadInput(f"output {str(output)!r}: there is no folder {str(output.parent)!r}")
    if output is not None and output.is_dir():
        raise BadInput(f"output {str(output)!r} is a folder; give a file in it")
    if output is not None and not os.access(output.parent, os.W_OK):
        raise BadInput(f"output {str(output)!r}: {str(output.parent)!r} cannot be written to")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the console script's entry."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        code = _exit_code(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # what is left is Python's and torch's, and would end in a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _exit_code(arguments: list[str]) -> int:
    usage: Any = typer.BadParameter.__mro__[2]  # ClickException: typer carries its own click
    given = arguments or ["--help"]
    try:
        code = int(app(given, prog_name="autofit", standalone_mode=False) or 0)
        if code == INTERRUPTED:  # typer's own answer to Ctrl-C, without a word
            _complain("interrupted")
        return code
    except AutofitError as error:
        _complain(str(error))
        return error.exit_code
    except usage as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        _complain(error.format_message().removesuffix(".") + hint)
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; there is nobody to tell
        sys.stderr.close()
        return 1
    except OSError as error:  # of the machine: a disk that is full, a folder that is gone
        _complain(str(error))
        return 1


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _complain(message: str) -> None:
    typer.echo(f"autofit: {' '.join(message.split())}", err=True)


if __name__ == "__main__":
    main()
