"""autofit profiles list | find | push | pull | check: what the places hold, and to and fro."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autofit import gpus, units
from autofit.plain import plain
from autofit.spec import BadInput, Workload

if TYPE_CHECKING:
    from autofit.places import Item, Place
    from autofit.places.exchange import Checked

app = typer.Typer(
    help="List, find and share stored profiles: in the project, of the user, by URL, shipped.",
    rich_markup_mode=None,
)

From = Annotated[
    str | None, typer.Option("--from", help="Look in this folder or URL only.", metavar="URL")
]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON to stdout.")]
Url = Annotated[str, typer.Argument(help="A folder, or a URL: hf://datasets/USER/REPO/FOLDER.")]


@app.command("list")
def list_all(source: From = None, as_json: Json = False) -> None:
    """List all profiles, place by place in the order in which they are searched."""
    _show(_items(source), as_json)


@app.command()
def find(
    pipeline: Annotated[
        str | None, typer.Option(help="Part of the pipeline's class, as flux.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    budget: Annotated[str | None, typer.Option(help="The peak is at most this, as 8GB.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Measured on this card of the table (`autofit gpus`).")
    ] = None,
    source: From = None,
    as_json: Json = False,
) -> None:
    """List the profiles for which all of this holds, the fastest first."""
    pixels = units.parse_pixels(size) if size is not None else None
    most_bytes = units.parse_size(budget, "budget") if budget is not None else None
    card = gpus.find(gpu) if gpu is not None else None
    alike = [
        item
        for item in _items(source)
        if (pipeline is None or pipeline.lower() in item.entry.pipeline.lower())
        and (pixels is None or pixels == (item.entry.workload.width, item.entry.workload.height))
        and (most_bytes is None or item.entry.peak_bytes <= most_bytes)
    ]
    found = [item for item in alike if card is None or card == _card(item)]
    if alike and not found and not as_json:
        _complain(f"measured on other cards: {len(alike)}; without --gpu they are listed")
    _show(sorted(found, key=lambda i: i.entry.image_s / i.entry.workload.batch), as_json)


@app.command()
def push(
    profile: Annotated[Path, typer.Argument(help="A profile's file.")],
    url: Url,
) -> None:
    """Put a profile into a place, and list it in the place's index.json."""
    from autofit.places import exchange

    typer.echo(exchange.push(profile, url))


@app.command()
def pull(
    url: Url,
    name: Annotated[str | None, typer.Argument(help="One file of it; all if none.")] = None,
) -> None:
    """Copy profiles into the user's folder, where `apply` finds them; each is checked."""
    from autofit.places import at, exchange

    _report(exchange.pull(at(url), name))


@app.command()
def check(
    url: Annotated[
        str | None, typer.Argument(help="A profile, a folder or a URL; all places if none.")
    ] = None,
) -> None:
    """Read every profile anew; exit code 2 and a line for each that cannot be used."""
    from autofit.places import at, exchange

    if url is not None and Path(url).is_file():
        _report(exchange.check(at(str(Path(url).parent)), Path(url).name))
    else:
        _report(exchange.check_all(_among(url)))


def _items(source: str | None) -> list[Item]:
    from autofit import places

    found, faults = places.items(_among(source))
    if source is not None and not found and len(faults) == 1:
        raise BadInput(faults[0])  # there is nothing else to look at
    for fault in faults:
        _complain(f"passed over: {fault}")
    return found


def _among(source: str | None) -> tuple[Place, ...]:
    from autofit import places

    return places.places() if source is None else (places.at(source),)


def _card(item: Item) -> gpus.Gpu | None:
    try:
        return gpus.find(item.entry.device, item.entry.total_bytes)
    except BadInput:  # not in the table
        return None


def _report(read: Iterable[Checked]) -> None:
    """Print where each profile is, and each fault; exit with 2 where there was one."""
    faults = 0
    for one in read:
        if one.profile is None:
            faults += 1
            _complain(one.fault)
        else:
            typer.echo(_printable(one.location))
    if faults:
        raise typer.Exit(BadInput.exit_code)


# ---------------------------------------------------------------- what is shown


def _show(items: list[Item], as_json: bool) -> None:
    if as_json:
        rows = [
            {"place": i.place.name, "location": i.place.location(i.name), **plain(i.entry)}
            for i in items
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not items:
        typer.echo("there is no such profile", err=True)
        return
    table = [_cells(item) for item in items]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        line = "  ".join(f"{c:<{width}}" for c, width in zip(cells, widths, strict=True))
        typer.echo(line.rstrip())


def _cells(item: Item) -> tuple[str, ...]:
    entry = item.entry
    cells = (
        entry.pipeline,
        _shape(entry.workload),
        units.format_bytes(entry.budget_bytes),
        units.format_seconds(entry.image_s),
        units.format_bytes(entry.peak_bytes),
        entry.device,
        item.place.location(item.name),
    )
    return tuple(map(_printable, cells))


def _shape(workload: Workload) -> str:
    many = f" x{workload.batch}" if workload.batch > 1 else ""
    return f"{workload.width}x{workload.height}{many}, {workload.steps} steps"


def _printable(text: str) -> str:
    """A stranger's text without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _complain(message: str) -> None:
    typer.echo(f"autofit: {_printable(' '.join(message.split()))}", err=True)
