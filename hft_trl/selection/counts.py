"""
How many pieces of each size to take so that they add up nearest to a goal: bounded subset sum, with little spread.

Numbers in, numbers out. The counts start where the caller wants them and leave that only as far as the goal asks for.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

# All sums of some pieces are the bits of one whole number, in units of their sizes' common divisor: up to so many
# bits.
_MAX_BITS = 1 << 24
# Where limits may bind there is such a number for each number of pieces taken: up to so many bits together.
_MAX_TRACKED = 1 << 30

T = TypeVar("T")


@dataclass(frozen=True)
class Pieces:
    """`number` pieces of one `size`, of which about `start` are to be taken."""

    size: int
    number: int
    start: Fraction

    def window(self, width: int) -> range:
        """Counts that are no more than `width` away from `start`, rounded down and up."""
        return range(max(0, math.floor(self.start) - width), min(self.number, math.ceil(self.start) + width) + 1)


@dataclass(frozen=True)
class Block:
    """Kinds of pieces of which together no fewer than `low` and no more than `high` are taken."""

    kinds: tuple[Pieces, ...]
    low: int
    high: int

    def binds(self, width: int) -> bool:
        """Whether counts within `width` of their starts can break the limits."""
        windows = [kind.window(width) for kind in self.kinds]
        return sum(window[0] for window in windows) < self.low or sum(window[-1] for window in windows) > self.high

    def width_and_tracking(self, width: int, bits: int) -> tuple[int, bool]:
        """The width to search, and whether the number of pieces taken has to be tracked for the limits' sake."""
        while width and self.binds(width) and bits * sum(kind.number for kind in self.kinds) > _MAX_TRACKED:
            width //= 2
        return width, self.binds(width)


@dataclass(frozen=True)
class _Decision:
    """One kind's count, or (`kind` is `None`) the end of a block whose pieces were tracked."""

    # Number of pieces taken in the block so far (0 where it is not tracked) -> the sums that can be had before.
    before: dict[int, int]
    block: int
    place: int
    kind: Pieces | None = None
    window: range = range(0)
    tracked: bool = False


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """A random order. Of all methods, only `random()` is promised to give the same numbers in every Python."""
    return sorted(items, key=lambda _: rng.random())


def nearest_counts(
    blocks: Sequence[Block], goal: Fraction, tolerance: Fraction, rng: random.Random
) -> list[list[int]]:
    """
    Return how many pieces of each kind to take, a list for each block.

    Their sum is the nearest to `goal` that the limits of the blocks allow, with counts near their starts. Within
    `tolerance` of the goal no count is moved away from its start. `rng` breaks ties. Where sizes differ so much that
    their sums have too many bits, the large pieces are settled first and the small ones compensate.
    """
    counts, settled = _solve(blocks, goal, tolerance, rng)
    if settled:
        return counts
    others = _large_first(blocks, goal, tolerance, rng)
    return counts if counts and _miss(blocks, counts, goal) <= _miss(blocks, others, goal) else others


def _miss(blocks: Sequence[Block], counts: Sequence[Sequence[int]], goal: Fraction) -> Fraction:
    pairs = [pair for block, row in zip(blocks, counts, strict=True) for pair in zip(block.kinds, row, strict=True)]
    return abs(sum(kind.size * count for kind, count in pairs) - goal)


def _large_first(blocks: Sequence[Block], goal: Fraction, tolerance: Fraction, rng: random.Random) -> list[list[int]]:
    """
    Settles the large kinds, as many as one search can hold, then those that are left make up for what is missing.
    """
    counts = [[0] * len(block.kinds) for block in blocks]
    left = [list(range(len(block.kinds))) for block in blocks]
    while any(left):
        smallest = _smallest_together([blocks[index].kinds[place] for index, row in enumerate(left) for place in row])
        parts, places = [], []
        for index, block in enumerate(blocks):
            now = [place for place in left[index] if block.kinds[place].size >= smallest]
            later = sum(block.kinds[place].number for place in left[index] if place not in now)
            taken = sum(counts[index])
            parts.append(
                Block(tuple(block.kinds[place] for place in now), block.low - taken - later, block.high - taken)
            )
            places.append(now)
            left[index] = [place for place in left[index] if place not in now]
        rest = sum(
            blocks[index].kinds[place].size * blocks[index].kinds[place].start
            for index, row in enumerate(left)
            for place in row
        )
        for index, row in enumerate(_solve(parts, goal - rest, tolerance, rng)[0]):
            for place, count in zip(places[index], row, strict=True):
                counts[index][place] = count
                goal -= count * blocks[index].kinds[place].size
    return counts


def _smallest_together(kinds: Sequence[Pieces]) -> int:
    """The smallest size down to which the sums of all kinds, the large ones first, have few enough bits."""
    total = divisor = smallest = 0
    for kind in sorted(kinds, key=lambda kind: -kind.size):
        total += kind.size * kind.number
        divisor = math.gcd(divisor, kind.size)
        if smallest and total // divisor > _MAX_BITS:
            break
        smallest = kind.size
    return smallest


def _solve(
    blocks: Sequence[Block], goal: Fraction, tolerance: Fraction, rng: random.Random
) -> tuple[list[list[int]], bool]:
    """Counts within the least width that will do, and whether no others are nearer (or near enough anyway)."""
    kinds = [kind for block in blocks for kind in block.kinds]
    unit = math.gcd(*(kind.size for kind in kinds))
    widest = max(kind.number for kind in kinds)
    aim = goal / unit
    # Nothing comes nearer than this, limits or no limits.
    bound = min(aim % 1, -aim % 1)
    if sum(kind.size * kind.number for kind in kinds) // unit <= _MAX_BITS:
        sums = 1
        for kind in kinds:
            sums = _add(sums, kind.size // unit, kind.number)
        bound = min(abs(total - aim) for total in _neighbours(sums, aim))
    bound = max(bound, tolerance / unit)
    best: list[list[int]] = []
    miss: Fraction | None = None
    width = 0
    while width < 2 * widest:
        bits = sum(kind.size // unit * (len(kind.window(width)) - 1) for kind in kinds)
        if bits > _MAX_BITS:
            return best, False
        base, sums, decisions = _search(blocks, unit, width, bits)
        for total in shuffled(_neighbours(sums, aim - base), rng):
            if miss is None or abs(base + total - aim) < miss:
                miss, best = abs(base + total - aim), _trace(blocks, decisions, unit, total, rng)
        if miss is not None and miss <= bound:
            break
        width = 2 * width + 1
    return best, True


def _search(blocks: Sequence[Block], unit: int, width: int, bits: int) -> tuple[int, int, list[_Decision]]:
    """
    The sum of the least counts within `width`, the sums above it that can be had, and the decisions that lead there.
    """
    base, rows = 0, {0: 1}
    decisions = []
    for index, block in enumerate(blocks):
        near, tracked = block.width_and_tracking(width, bits)
        for place, kind in enumerate(block.kinds):
            window, size = kind.window(near), kind.size // unit
            decisions.append(_Decision(rows, index, place, kind, window, tracked))
            base += window[0] * size
            if tracked:
                following: dict[int, int] = {}
                for taken, sums in rows.items():
                    for more, count in enumerate(window):
                        following[taken + count] = following.get(taken + count, 0) | sums << (more * size)
                rows = following
            else:
                rows = {0: _add(rows[0], size, len(window) - 1)}
        if tracked:
            rows = {taken: sums for taken, sums in rows.items() if block.low <= taken <= block.high}
            decisions.append(_Decision(rows, index, 0))
            together = 0
            for sums in rows.values():
                together |= sums
            rows = {0: together}
    return base, rows[0], decisions


def _trace(
    blocks: Sequence[Block], decisions: Sequence[_Decision], unit: int, total: int, rng: random.Random
) -> list[list[int]]:
    """Counts that add up to `total`, each as near to its start as those decided before it leave open."""
    counts = [[0] * len(block.kinds) for block in blocks]
    taken = 0
    for decision in reversed(decisions):
        kind = decision.kind
        if kind is None:
            middle = sum(kind.start for kind in blocks[decision.block].kinds)
            open_now = [number for number, sums in decision.before.items() if sums >> total & 1]
            taken = min(shuffled(open_now, rng), key=lambda number: abs(number - middle))
            continue
        for count in sorted(shuffled(decision.window, rng), key=lambda count: abs(count - kind.start)):
            rest = total - (count - decision.window[0]) * (kind.size // unit)
            number = taken - count * decision.tracked
            if rest >= 0 and decision.before.get(number, 0) >> rest & 1:
                counts[decision.block][decision.place] = count
                total, taken = rest, number
                break
    return counts


def _add(sums: int, size: int, most: int) -> int:
    """The sums that any number of pieces of `size`, from none to `most`, makes of `sums`."""
    some = 1
    while most:
        some = min(some, most)
        sums |= sums << (some * size)
        most -= some
        some *= 2
    return sums


def _neighbours(sums: int, aim: Fraction) -> list[int]:
    """The greatest sum that is not above `aim` and the least one that is, if there are such sums."""
    split = max(0, math.floor(aim) + 1)
    below, above = sums & ((1 << split) - 1), sums >> split
    return [below.bit_length() - 1] * bool(below) + [split + (above & -above).bit_length() - 1] * bool(above)
