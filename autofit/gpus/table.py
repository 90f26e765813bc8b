"""The rows of ``cards.toml``, and which of them a name means."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from autofit.spec import BFLOAT16_CAPABILITY, BadInput
from autofit.units import GIB, format_bytes

# Of one PCIe lane, in one direction: transfers/s x 128/130 (the line code) / 8.
LANE_BYTES_S = {3: 8e9 * 128 / 130 / 8, 4: 16e9 * 128 / 130 / 8, 5: 32e9 * 128 / 130 / 8}
NEAR = 6  # names that an error suggests
SHORTEST = 3  # letters that tell anything: "l40", "h100"
_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|generation|blackwell|(with)? ?max-?q ?design")
_TITLE = re.compile(r"gpu$|workstationedition$")


@dataclass(frozen=True)
class Gpu:
    """A card as sold: what its vendor states, and nothing measured. Rates are dense ones."""

    slug: str
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    memory_bytes_s: float
    sms: int
    boost_hz: float
    tensor_hz: float
    sustained_hz: float  # under products, by its power
    threads: int  # resident, of one SM
    pcie: int
    lanes: int
    fp32_flops_s: float
    fp16_flops_s: float | None  # with sums in float32; None without tensor cores
    ecc: bool
    desktop: bool  # it can drive a screen, and mostly does
    source: str

    @property
    def bf16_flops_s(self) -> float | None:
        """None before Ampere, where bfloat16 is emulated."""
        return self.fp16_flops_s if self.capability >= BFLOAT16_CAPABILITY else None

    @property
    def bus_bytes_s(self) -> float:
        """Of the card's PCIe link, in one direction."""
        return self.lanes * LANE_BYTES_S[self.pcie]


@cache
def gpus() -> tuple[Gpu, ...]:
    """All cards of the table, in its order."""
    return tuple(_gpu(family | card) for family in families() for card in family["cards"])


@cache
def families() -> tuple[dict[str, Any], ...]:
    """Read the table as it is written: what a family's cards share, and ``cards``."""
    text = resources.files("autofit.gpus").joinpath("cards.toml").read_text("utf-8")
    return tuple(tomllib.loads(text)["family"])


def computed_flops_s(row: dict[str, Any], dtype: str) -> float | None:
    """SMs x clock x FLOP a clock of a row, for its key ``fp32`` or ``fp16``; None without one."""
    if dtype not in row:
        return None
    mhz = row["mhz"] if dtype == "fp32" else row.get("tensor_mhz", row["mhz"])
    return float(row["sms"] * mhz * 1e6 * row[dtype])


def _gpu(row: dict[str, Any]) -> Gpu:
    fp32, fp16 = (_rate(row, dtype) for dtype in ("fp32", "fp16"))
    assert fp32 is not None
    return Gpu(
        slug=row["slug"],
        name=row["name"],
        capability=(row["capability"][0], row["capability"][1]),
        memory_bytes=row["gib"] * GIB,
        memory_bytes_s=row["gb_s"] * 1e9,
        sms=row["sms"],
        boost_hz=row["mhz"] * 1e6,
        tensor_hz=row.get("tensor_mhz", row["mhz"]) * 1e6,
        sustained_hz=row.get("sustained_mhz", row["mhz"]) * 1e6,
        threads=row["threads"],
        pcie=row["pcie"],
        lanes=row.get("lanes", 16),
        fp32_flops_s=fp32,
        fp16_flops_s=fp16,
        ecc=row.get("ecc", False),
        desktop=row["desktop"],
        source=row["source"],
    )


def _rate(row: dict[str, Any], dtype: str) -> float | None:
    stated = row.get(f"{dtype}_tflops")
    return stated * 1e12 if stated is not None else computed_flops_s(row, dtype)


# ---------------------------------------------------------------- names


def find(name: str, memory_bytes: int | None = None) -> Gpu:
    """Find the card that a name means, written as its slug, as torch reports it or in between.

    ``memory_bytes``, where known from a probe, tells cards of one name apart.

    Raises:
        BadInput: no card, or more than one; the message has the slugs to choose from.
    """
    key = _key(name)
    found = [g for g in gpus() if _key(g.slug) == key] or [g for g in gpus() if _key(g.name) == key]
    if memory_bytes is not None and found:
        found = [min(found, key=lambda g: abs(g.memory_bytes - memory_bytes))]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{g.slug} ({format_bytes(g.memory_bytes)})" for g in found)
        raise BadInput(f"gpu {name!r} comes in more than one kind; write {choices}")
    raise BadInput(f"gpu {name!r} is not in the table. {_hint(key)}")


def _hint(key: str) -> str:
    near = _near(key)
    if not near:
        return "`autofit gpus` lists what is."
    return f"Did you mean {', '.join(near)}? `autofit gpus` lists all."


def _near(key: str) -> list[str]:
    """Slugs that hold what was typed, else such as look alike."""
    keys = {_key(g.slug): g.slug for g in gpus()}
    holding = [slug for k, slug in keys.items() if len(key) >= SHORTEST and key in k]
    alike = difflib.get_close_matches(key, keys, n=NEAR, cutoff=0.6)
    return holding[:NEAR] or [keys[k] for k in alike]


def _key(name: str) -> str:
    """The same for ``NVIDIA GeForce RTX 4060 Laptop GPU`` and ``rtx-4060-laptop``."""
    text = _NOISE.sub(lambda m: "maxq" if "design" in m[0] else "", name.lower())
    return _TITLE.sub("", re.sub(r"[^a-z0-9]+", "", text))
