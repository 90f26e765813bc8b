"""What runs next, across forwards and components, as the last image showed it."""

from __future__ import annotations

from collections.abc import Sequence

from autofit.streaming.parts import Part
from autofit.streaming.units import Unit

LONGEST = 4096  # forwards of an image that are remembered


class Script:
    """The forwards of the last image, in order, and a cursor over their units.

    Wrong guesses (another number of steps) cost a copy made for nothing, never a wrong result.
    """

    def __init__(self) -> None:
        self._expected: list[Part] = []
        self._actual: list[Part] = []  # of the image under way
        self._place: int | None = None  # of the cursor's part among the expected; None: astray
        self._part: Part | None = None
        self._next = 0
        self._index: dict[Unit, tuple[Part, int]] = {}
        self.image = 0  # the number of the one under way
        self.forwards = 0  # of all parts

    def learn(self, parts: Sequence[Part]) -> None:
        """The units of these parts, as they are now; the cursor is lost."""
        self._index = {u: (p, n) for p in parts for n, u in enumerate(p.streamed)}
        self._part = self._place = None

    def begin(self, part: Part) -> None:
        """A forward of this part begins. An image ends where an earlier stage begins again."""
        self.forwards += 1
        ranked = [p.rank for p in self._actual if p.rank is not None]
        if part.rank is not None and ranked and part.rank < ranked[-1]:
            self._expected, self._actual = self._actual, []
            self.image += 1
        if len(self._actual) == LONGEST:  # no image ends where one part runs alone
            self._actual = []
        self._actual.append(part)

    def expect(self, part: Part) -> None:
        """Put the cursor before the first unit of this part, which is taken to run from now on."""
        self._part, self._place, self._next = part, None, 0

    def seek(self, unit: Unit) -> None:
        """Put the cursor behind a unit that runs now."""
        found = self._index.get(unit)
        if found is None:  # spare: what comes after it is not known
            self._part = None
            return
        self._part, number = found
        self._next = number + 1
        place = len(self._actual) - 1
        known = place < len(self._expected) and self._expected[place] is self._part
        self._place = place if known else None

    def peek(self) -> Unit | None:
        for _ in range(len(self._expected) + 1):
            if self._part is None:
                return None
            if self._next < len(self._part.streamed):
                return self._part.streamed[self._next]
            self._turn()
        return None

    def advance(self) -> None:
        self._next += 1

    def _turn(self) -> None:
        """Go on to the next part: the expected one, or the same again."""
        self._next = 0
        if self._place is not None:
            self._place = (self._place + 1) % len(self._expected)
            self._part = self._expected[self._place]
