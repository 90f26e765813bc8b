"""Which units stay and where the others land: arithmetic, no torch.

The units of one component run in the same order in every forward. Those that are not resident are
copied into an arena in that order, first in, first out, as far ahead as the arena allows and across
the end of a forward into the next. So each has a fixed place in the arena, and a copy may begin as
soon as the last unit that lay there has run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 512  # of every tensor in the pool; also what CUDA's allocator gives
# Arenas that are tried, as shares of the room: a longer look-ahead against more resident weights.
_ARENA_SHARES = (0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
NEARLY_AS_FAST = 1.005  # then the smaller arena, with fewer bytes to stream, is the better one
_CYCLES = 3  # simulated forwards: the first fills the arena, the later ones are steady


@dataclass(frozen=True)
class Item:
    """One unit, in the order of execution.

    ``compute_s``: from its start to the next unit's, without the wait for its weights.
    """

    size_bytes: int
    compute_s: float


@dataclass(frozen=True)
class Schedule:
    """``offsets``: where each unit lands in the arena; None for those that are resident."""

    offsets: tuple[int | None, ...]
    arena_bytes: int
    resident_bytes: int
    forward_s: float  # predicted, in the steady state


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def schedule(
    items: Sequence[Item],
    room_bytes: int,
    bytes_s: float,
    least_arena_bytes: int = 0,
    most_arena_bytes: int | None = None,
) -> Schedule:
    """Share ``room_bytes`` between resident units and the arena so that a forward is fastest.

    ``bytes_s`` is the bandwidth of the bus; ``least_arena_bytes`` is what other components need of
    the arena that they share, ``most_arena_bytes`` the part of the room that it may lie in. That
    part must hold the largest unit.
    """
    largest_bytes = max((i.size_bytes for i in items), default=0)
    total_bytes = sum(i.size_bytes for i in items)
    if total_bytes + least_arena_bytes <= room_bytes:
        everything = sum(i.compute_s for i in items)
        offsets = (None,) * len(items)
        return Schedule(offsets, room_bytes - total_bytes, total_bytes, everything)
    least_bytes = max(least_arena_bytes, largest_bytes)
    arenas = {max(least_bytes, int(room_bytes * share)) for share in _ARENA_SHARES}
    arenas |= {least_bytes, 2 * least_bytes, 3 * least_bytes}
    most_bytes = room_bytes if most_arena_bytes is None else most_arena_bytes
    found = [_with_arena(items, room_bytes, a, bytes_s) for a in arenas if a <= most_bytes]
    bar_s = min(s.forward_s for s in found) * NEARLY_AS_FAST
    return min((s for s in found if s.forward_s <= bar_s), key=lambda s: s.arena_bytes)


def _with_arena(
    items: Sequence[Item], room_bytes: int, arena_bytes: int, bytes_s: float
) -> Schedule:
    streams = spread(items, room_bytes - arena_bytes)
    sizes = [i.size_bytes if s else None for i, s in zip(items, streams, strict=True)]
    resident_bytes = _resident_bytes(items, streams)
    full = ring(sizes, arena_bytes)
    # A short last round lies where the next forward begins, which would wait for its end.
    round_bytes = sum(filter(None, sizes)) / max(1, full.count(0))
    even = ring(sizes, arena_bytes, round_bytes=round_bytes)
    found = (
        Schedule(offsets, arena_bytes, resident_bytes, forward_s(items, offsets, bytes_s))
        for offsets in dict.fromkeys((full, even))  # mostly one and the same
    )
    return min(found, key=lambda s: s.forward_s)


def spread(items: Sequence[Item], resident_bytes: int) -> list[bool]:
    """Choose which units stream so that the others take at most ``resident_bytes``.

    Bytes are spread over the forward as the compute is, which hides as many as can be hidden: walk
    the units, and stream one whenever the bytes due by then have run ahead of the bytes streamed.
    """
    total_bytes = sum(i.size_bytes for i in items)
    total_s = sum(i.compute_s for i in items) or 1.0
    due = (total_bytes - resident_bytes) / total_s  # bytes a second of compute
    low, high = 0.0, 64.0  # how much to overshoot: whole units never come to just the share
    streamed = [True] * len(items)
    for _ in range(24):
        middle = (low + high) / 2
        chosen = _walk(items, due * middle)
        if _resident_bytes(items, chosen) <= resident_bytes:
            high, streamed = middle, chosen
        else:
            low = middle
    even = _walk(items, (total_bytes - _resident_bytes(items, streamed)) / total_s)
    if _resident_bytes(items, even) <= resident_bytes:  # the least overshoot bunches them
        streamed = even
    return _fill(items, streamed, resident_bytes)


def _walk(items: Sequence[Item], bytes_per_s: float) -> list[bool]:
    chosen, credit_bytes = [], 0.0
    for item in items:
        credit_bytes += bytes_per_s * item.compute_s
        chosen.append(credit_bytes >= item.size_bytes / 2)
        if chosen[-1]:
            credit_bytes -= item.size_bytes
    return chosen


def _fill(items: Sequence[Item], streamed: list[bool], resident_bytes: int) -> list[bool]:
    """Keep what else fits, the largest first."""
    left = resident_bytes - _resident_bytes(items, streamed)
    for number in sorted(range(len(items)), key=lambda n: -items[n].size_bytes):
        if streamed[number] and items[number].size_bytes <= left:
            streamed[number] = False
            left -= items[number].size_bytes
    return streamed


def _resident_bytes(items: Sequence[Item], streamed: Sequence[bool]) -> int:
    return sum(i.size_bytes for i, s in zip(items, streamed, strict=True) if not s)


def ring(
    sizes: Sequence[int | None],
    arena_bytes: int,
    start_bytes: int = 0,
    round_bytes: float = math.inf,
) -> tuple[int | None, ...]:
    """Lay units out one behind the other, from the beginning again where the arena ends, or every
    ``round_bytes``, to the nearest unit."""
    offsets: list[int | None] = []
    cursor, laid_bytes = start_bytes, 0.0
    for size_bytes in sizes:
        if size_bytes is None:
            offsets.append(None)
            continue
        is_over = laid_bytes + size_bytes / 2 > round_bytes
        if cursor + size_bytes > arena_bytes or is_over:
            cursor, laid_bytes = 0, laid_bytes - round_bytes
        offsets.append(cursor)
        cursor, laid_bytes = cursor + size_bytes, laid_bytes + size_bytes
    return tuple(offsets)


def forward_s(items: Sequence[Item], offsets: Sequence[int | None], bytes_s: float) -> float:
    """Simulate forwards back to back; return the seconds of one in the steady state."""
    streamed = [n for n, offset in enumerate(offsets) if offset is not None]
    blockers = _blockers(items, offsets, streamed)
    ran_s: dict[int, float] = {}  # when a streamed unit was done, by its number over all cycles
    compute_s = bus_s = 0.0
    ends = []
    turn = 0
    for _ in range(_CYCLES):
        for number, item in enumerate(items):
            if offsets[number] is None:
                compute_s += item.compute_s
                continue
            blocker = turn - blockers[turn % len(streamed)]
            bus_s = max(bus_s, ran_s.get(blocker, 0.0)) + item.size_bytes / bytes_s
            compute_s = max(compute_s, bus_s) + item.compute_s
            ran_s[turn] = compute_s
            turn += 1
        ends.append(compute_s)
    return ends[-1] - ends[-2]


def _blockers(
    items: Sequence[Item], offsets: Sequence[int | None], streamed: Sequence[int]
) -> list[int]:
    """For each streamed unit, how many turns before it the last unit lay where it will land."""

    def interval(number: int) -> tuple[int, int]:
        offset = offsets[number]
        assert offset is not None
        return offset, offset + items[number].size_bytes

    count = len(streamed)
    found = []
    for turn, number in enumerate(streamed):
        begin, end = interval(number)
        for back in range(1, count + 1):
            other_begin, other_end = interval(streamed[(turn - back) % count])
            if other_begin < end and begin < other_end:
                break
        found.append(back)
    return found
