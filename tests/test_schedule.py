"""What stays and where the rest lands: arithmetic that must hold for all sizes and speeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from autofit.streaming.schedule import (
    ALIGNMENT_BYTES,
    NEARLY_AS_FAST,
    Item,
    aligned,
    forward_s,
    ring,
    schedule,
    spread,
)

SIZES = st.integers(1, 64).map(lambda n: n * ALIGNMENT_BYTES)
ITEMS = st.lists(st.builds(Item, SIZES, st.floats(1e-5, 1e-2)), min_size=1, max_size=24)
BANDWIDTHS = st.floats(1e5, 1e10)
FEW = settings(max_examples=50, deadline=None)
SLOWER = 1.03  # more room may cost this much: arenas are tried at a few shares of it only


def total_bytes(items: Sequence[Item]) -> int:
    return sum(i.size_bytes for i in items)


def largest_bytes(items: Sequence[Item]) -> int:
    return max(i.size_bytes for i in items)


def compute_s(items: Sequence[Item]) -> float:
    return sum(i.compute_s for i in items)


def streamed_bytes(items: Sequence[Item], offsets: Sequence[int | None]) -> int:
    return sum(i.size_bytes for i, o in zip(items, offsets, strict=True) if o is not None)


@st.composite
def rooms(draw: st.DrawFn) -> tuple[list[Item], int]:
    """Items and a room that holds the largest, and at most a little more than all of them."""
    items = draw(ITEMS)
    return items, draw(st.integers(largest_bytes(items), int(1.1 * total_bytes(items)) + 1))


# ---------------------------------------------------------------- which stay


@FEW
@given(st.integers(0, 2**40))
def test_alignment_rounds_up_to_the_next_step(size_bytes: int) -> None:
    found = aligned(size_bytes)
    assert found % ALIGNMENT_BYTES == 0
    assert 0 <= found - size_bytes < ALIGNMENT_BYTES


@FEW
@given(rooms())
def test_what_stays_fits(given_room: tuple[list[Item], int]) -> None:
    items, room_bytes = given_room
    streams = spread(items, room_bytes)
    left_bytes = room_bytes - sum(
        i.size_bytes for i, s in zip(items, streams, strict=True) if not s
    )
    assert left_bytes >= 0
    # and nothing that streams would fit as well
    assert all(i.size_bytes > left_bytes for i, s in zip(items, streams, strict=True) if s)


def test_no_room_keeps_nothing_and_all_of_it_keeps_all() -> None:
    items = [Item(512 * n, 1e-3) for n in range(1, 9)]
    assert spread(items, 0) == [True] * 8
    assert spread(items, total_bytes(items)) == [False] * 8


@pytest.mark.parametrize("streamed", [1, 2, 5, 10])
def test_equal_units_are_not_streamed_in_a_row(streamed: int) -> None:
    items = [Item(512, 1e-3)] * 20
    found = spread(items, 512 * (20 - streamed))
    places = [n for n, s in enumerate(found) if s]
    assert len(places) == streamed
    gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 20], strict=True)]
    assert sum(gaps) == 20
    assert min(gaps) > 0.5 * 20 / streamed


def test_units_that_compute_longer_hide_more_bytes() -> None:
    slow, quick = [Item(512, 9e-3)] * 10, [Item(512, 1e-3)] * 10
    found = spread([*slow, *quick], 512 * 10)
    assert sum(found[:10]) >= 8


# ---------------------------------------------------------------- where they land


@FEW
@given(
    st.lists(st.none() | st.integers(1, 2000), max_size=24),
    st.integers(2000, 8000),
    st.integers(0, 8000),
)
def test_the_ring_lays_units_one_behind_the_other(
    sizes: list[int | None], arena_bytes: int, start_bytes: int
) -> None:
    offsets = ring(sizes, arena_bytes, start_bytes)
    assert [o is None for o in offsets] == [s is None for s in sizes]
    ends = start_bytes
    for size, offset in zip(sizes, offsets, strict=True):
        if size is None or offset is None:
            continue
        assert 0 <= offset <= arena_bytes - size
        assert offset in (ends, 0)  # behind the last, or from the beginning
        assert offset == ends or ends + size > arena_bytes
        ends = offset + size


@FEW
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=24), st.integers(2000, 8000))
def test_units_in_a_row_lie_apart_as_long_as_they_fit(sizes: list[int], arena_bytes: int) -> None:
    """A round of the arena begins where the next unit does not fit; within one nothing overlaps."""
    offsets = ring(sizes, arena_bytes)
    spans: list[tuple[int, int]] = []
    for size, offset in zip(sizes, offsets, strict=True):
        assert offset is not None
        if offset == 0:
            spans = []
        assert all(end <= offset or offset + size <= begin for begin, end in spans)
        spans.append((offset, offset + size))


@FEW
@given(st.integers(1, 60), st.integers(1, 20))
def test_even_rounds_are_as_many_and_differ_by_one_unit(count: int, places: int) -> None:
    sizes = [512] * count
    full = ring(sizes, 512 * places)
    even = ring(sizes, 512 * places, round_bytes=512 * count / full.count(0))
    assert even.count(0) == full.count(0)
    begins = [n for n, offset in enumerate(even) if offset == 0]
    lengths = [end - begin for begin, end in pairwise([*begins, count])]
    assert max(lengths) - min(lengths) <= 1
    assert [o for n in lengths for o in range(0, 512 * n, 512)] == list(even)


# ---------------------------------------------------------------- how long it takes


@FEW
@given(ITEMS, BANDWIDTHS, st.data())
def test_a_forward_is_bound_by_compute_and_by_the_bus(
    items: list[Item], bytes_s: float, data: st.DataObject
) -> None:
    streams = data.draw(st.lists(st.booleans(), min_size=len(items), max_size=len(items)))
    arena_bytes = data.draw(st.integers(largest_bytes(items), 2 * total_bytes(items)))
    sizes = [i.size_bytes if s else None for i, s in zip(items, streams, strict=True)]
    offsets = ring(sizes, arena_bytes)
    found_s = forward_s(items, offsets, bytes_s)
    moved_s = streamed_bytes(items, offsets) / bytes_s
    assert found_s >= max(compute_s(items), moved_s) * (1 - 1e-9)
    assert found_s <= (compute_s(items) + moved_s) * (1 + 1e-9)  # the worst: one after the other


@FEW
@given(ITEMS, BANDWIDTHS)
def test_with_one_place_each_copy_waits_for_the_unit_before(
    items: list[Item], bytes_s: float
) -> None:
    found_s = forward_s(items, [0] * len(items), bytes_s)
    assert found_s == pytest.approx(compute_s(items) + total_bytes(items) / bytes_s)


@FEW
@given(st.integers(2, 20), BANDWIDTHS, st.floats(1e-5, 1e-2))
def test_with_two_places_copies_of_equal_units_hide(
    count: int, bytes_s: float, unit_s: float
) -> None:
    items = [Item(512, unit_s)] * (2 * count)
    found_s = forward_s(items, ring([512] * len(items), 1024), bytes_s)
    assert found_s == pytest.approx(max(compute_s(items), total_bytes(items) / bytes_s))


@FEW
@given(rooms(), BANDWIDTHS)
def test_a_schedule_keeps_within_its_room(
    given_room: tuple[list[Item], int], bytes_s: float
) -> None:
    items, room_bytes = given_room
    found = schedule(items, room_bytes, bytes_s)
    moved_bytes = streamed_bytes(items, found.offsets)
    assert found.resident_bytes == total_bytes(items) - moved_bytes
    assert found.arena_bytes + found.resident_bytes <= room_bytes
    assert all(
        0 <= offset <= found.arena_bytes - item.size_bytes
        for item, offset in zip(items, found.offsets, strict=True)
        if offset is not None
    )
    assert found.forward_s >= max(compute_s(items), moved_bytes / bytes_s) * (1 - 1e-9)


@FEW
@given(rooms(), BANDWIDTHS)
def test_no_arena_that_is_tried_would_be_faster_than_streaming_all(
    given_room: tuple[list[Item], int], bytes_s: float
) -> None:
    items, room_bytes = given_room
    everything = ring([i.size_bytes for i in items], room_bytes)
    found = schedule(items, room_bytes, bytes_s)
    assert found.forward_s <= forward_s(items, everything, bytes_s) * NEARLY_AS_FAST * (1 + 1e-9)


@FEW
@given(ITEMS, BANDWIDTHS, st.integers(0, 2**16))
def test_room_for_all_streams_nothing(items: list[Item], bytes_s: float, more_bytes: int) -> None:
    found = schedule(items, total_bytes(items) + more_bytes, bytes_s, more_bytes)
    assert set(found.offsets) == {None}
    assert found.arena_bytes == more_bytes
    assert found.forward_s == pytest.approx(compute_s(items))


@FEW
@given(rooms(), BANDWIDTHS, st.integers(1, 2**16))
def test_the_arena_is_large_enough_for_other_parts(
    given_room: tuple[list[Item], int], bytes_s: float, least_bytes: int
) -> None:
    items, room_bytes = given_room
    assume(least_bytes <= room_bytes)
    assert schedule(items, room_bytes, bytes_s, least_bytes).arena_bytes >= least_bytes


def test_nothing_to_schedule() -> None:
    found = schedule([], 4096, 1e9, 1024)
    assert (found.offsets, found.resident_bytes, found.forward_s) == ((), 0, 0.0)
    assert found.arena_bytes >= 1024


def models() -> st.SearchStrategy[list[Item]]:
    """As denoisers are: many units, of a few kinds that repeat."""
    kinds = st.lists(st.builds(Item, SIZES, st.floats(1e-4, 1e-2)), min_size=1, max_size=3)
    return st.builds(lambda k, times: k * times, kinds, st.integers(20, 40))


@FEW
@given(models(), st.floats(0.1, 0.9), st.floats(0.05, 0.5), st.floats(0.3, 3.0))
@example([Item(512, 1 / 128)] * 21, 0.34375, 0.0625, 0.875)
def test_more_room_is_not_slower(
    items: list[Item], share: float, more: float, bus_per_compute: float
) -> None:
    bytes_s = bus_per_compute * total_bytes(items) / compute_s(items)
    rooms_bytes = [int(s * total_bytes(items)) for s in (share, min(1.0, share + more))]
    assume(rooms_bytes[0] >= 4 * largest_bytes(items))
    small, large = (schedule(items, room, bytes_s) for room in rooms_bytes)
    assert large.forward_s <= small.forward_s * SLOWER


@FEW
@given(st.integers(20, 60), st.floats(0.2, 0.95), st.floats(0.1, 3.0))
def test_equal_units_come_near_the_limit(count: int, share: float, bus_per_compute: float) -> None:
    """The limit: all but what could stay is streamed, all of it hidden."""
    items = [Item(1 << 20, 1e-3)] * count
    bytes_s = bus_per_compute * total_bytes(items) / compute_s(items)
    found = schedule(items, int(share * total_bytes(items)), bytes_s)
    moved_s = (1 - share) * total_bytes(items) / bytes_s
    lost_s = 3 * (1 << 20) / bytes_s  # the arena is not for residents, and units are whole
    assert found.forward_s <= 1.06 * max(compute_s(items), moved_s) + lost_s


def test_an_arena_lies_where_it_may() -> None:
    """Of a room in two pieces it has one, and resident units the other too."""
    items = [Item(10, 5.0), Item(40, 1.0), Item(10, 0.1)] * 20  # a longer look-ahead pays
    free, bounded = schedule(items, 500, 8.0), schedule(items, 500, 8.0, 0, 40)
    assert bounded.arena_bytes == 40 < free.arena_bytes
    assert bounded.resident_bytes >= free.resident_bytes
