"""The trials of a study and the facts of a device as tables for a reader."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from autofit.report import plan_text
from autofit.spec import (
    Attempt,
    Device,
    Failure,
    Fidelity,
    Measurement,
    Plan,
    Why,
)
from autofit.units import format_bytes, format_seconds

DETAILED = (Why.ERROR, Why.BAD_OUTPUT, Why.CRASH, Why.HANG)  # the others say all by their name


# ---------------------------------------------------------------- the trials of a study


def trials_table(attempts: Sequence[Attempt], best: Plan | None, budget_bytes: int) -> Table:
    """Show a row a trial: the best first, then by seconds, failures last.

    The seconds are those of a whole generation. Trials keep the number of their turn.
    """
    table = Table(title=f"{len(attempts)} trials within {format_bytes(budget_bytes)}")
    for name in ("#", "plan", "seconds", "peak", "PSNR", "result"):
        words = name in ("plan", "result")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    winner = _winner(attempts, best)
    for number, attempt in _ranked(attempts, winner):
        result = _result(attempt, winner, budget_bytes)
        text = plan_text(attempt.plan)
        if isinstance(attempt.outcome, Measurement):
            result = "; ".join([*filter(None, [result]), *attempt.outcome.fallbacks])
        cells = map(Text, (str(number), text, *_figures(attempt), result))  # Text: no markup read
        table.add_row(*cells, style="bold green" if attempt is winner else None)
    return table


def _winner(attempts: Iterable[Attempt], best: Plan | None) -> Attempt | None:
    """The trial that speaks for the best plan: its verification if there was one."""
    measured = (
        (not a.outcome.verified, a.outcome.image_s, number, a)
        for number, a in enumerate(attempts)
        if a.plan == best and isinstance(a.outcome, Measurement)
    )
    return min(measured, default=(None,))[-1]


def _ranked(attempts: Sequence[Attempt], winner: Attempt | None) -> list[tuple[int, Attempt]]:
    def key(numbered: tuple[int, Attempt]) -> tuple[bool, float]:
        outcome = numbered[1].outcome
        seconds = outcome.image_s if isinstance(outcome, Measurement) else math.inf
        return numbered[1] is not winner, seconds

    return sorted(enumerate(attempts, 1), key=key)


def _figures(attempt: Attempt) -> tuple[str, str, str]:
    outcome = attempt.outcome
    if isinstance(outcome, Failure):
        return "", "", ""
    psnr = outcome.psnr_db
    if psnr is None:
        fidelity = "exact" if attempt.plan.fidelity is Fidelity.EXACT else ""
    else:
        fidelity = "exact" if math.isinf(psnr) else f"{psnr:.1f} dB"
    return format_seconds(outcome.image_s), format_bytes(outcome.peak_bytes), fidelity


def _result(attempt: Attempt, winner: Attempt | None, budget_bytes: int) -> str:
    outcome = attempt.outcome
    if isinstance(outcome, Failure):
        return _failure(outcome)
    if outcome.peak_bytes > budget_bytes:
        return f"over the budget by {format_bytes(outcome.peak_bytes - budget_bytes)}"
    if winner is None or not isinstance(winner.outcome, Measurement):
        return ""
    if attempt is winner or attempt.plan == winner.plan:
        return "best" if attempt is winner else "same plan as the best"
    slower = outcome.image_s / winner.outcome.image_s - 1
    if slower <= 0:
        return "faster, " + ("but not chosen" if outcome.verified else "in a short trial only")
    return f"slower than the best by {slower:.{0 if slower >= 0.01 else 2}%}"


def _failure(failure: Failure) -> str:
    text = failure.why.value
    if failure.phase is not None:
        text += f" in {failure.phase.value}"
    if failure.needed_bytes is not None:
        text += f", needed {format_bytes(failure.needed_bytes)}"
    first = failure.detail.strip().partition("\n")[0]
    return f"{text}: {first}" if first and failure.why in DETAILED else text


# ---------------------------------------------------------------- a device


def device_table(device: Device) -> Table:
    """Show what was found out about a device, or what the GPU table has of it, said to be so."""
    table = Table(title=Text(device.name), show_header=False)
    for row in _device_rows(device):
        table.add_row(*map(Text, row))
    return table


def _device_rows(device: Device) -> list[tuple[str, str]]:
    rows = [("kind", device.kind), ("memory", format_bytes(device.total_bytes))]
    if device.capability is not None:
        rows.append(("capability", "{}.{}".format(*device.capability)))
    if device.context_bytes:
        rows.append(("taken by the context", format_bytes(device.context_bytes)))
    rows.append(("memory bandwidth", _rate(device.memory_bytes_s)))
    rows.append(("host memory limit", format_bytes(device.host_limit_bytes)))
    if device.kind == "cuda":
        rows.append(("from pinned host memory", _rate(device.pinned_bytes_s)))
        rows.append(("from pageable host memory", _rate(device.pageable_bytes_s)))
    for dtype, flops_s in device.flops_s.items():
        rows.append((f"{dtype} products", f"{flops_s / 1e12:.3g} TFLOP/s"))
    rows.append(("one operation launched", f"{device.launch_s * 1e6:.3g} us"))
    rows += [(f"{kernel} attention", text) for kernel, text in _kernels(device).items()]
    return rows + list(device.versions.items())


def _rate(bytes_s: float) -> str:
    return f"{format_bytes(round(bytes_s))}/s"


def _kernels(device: Device) -> dict[str, str]:
    """What each attention kernel answered for: ``float16 at head size 40, 64; ...``."""
    sizes: defaultdict[str, defaultdict[str, list[int]]]
    sizes = defaultdict(lambda: defaultdict(list))
    for kernel in device.kernels:
        sizes[kernel.name][kernel.dtype].append(kernel.head_size)
    return {
        name: "; ".join(
            f"{dtype} at head size {', '.join(map(str, sorted(heads)))}"
            for dtype, heads in by_dtype.items()
        )
        for name, by_dtype in sizes.items()
    }
