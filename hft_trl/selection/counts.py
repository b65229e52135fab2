"""
Count how many pieces of each size add up nearest to a goal: bounded subset sum.

All sums of some pieces are the bits of one whole number, so that adding a piece is a shift. The counts start where the
caller wants them and move only as far as the goal needs.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

# Length of one such number, and of all of them in a block whose limits need one for each number of pieces taken
_MAX_BITS = 1 << 24
_MAX_TRACKED = 1 << 30

T = TypeVar("T")


@dataclass(frozen=True)
class Pieces:
    """Store `number` pieces of one `size`; about `start` are to be taken."""

    size: int
    number: int
    start: Fraction

    def window(self, width: int) -> range:
        """Return the counts that are no more than `width` away from `start`."""
        return range(max(0, math.floor(self.start) - width), min(self.number, math.ceil(self.start) + width) + 1)


@dataclass(frozen=True)
class Block:
    """Store kinds of pieces by rising size, with limits `low` and `high` for their total number."""

    kinds: tuple[Pieces, ...]
    low: int
    high: int

    def binds(self, width: int) -> bool:
        """Return whether counts within `width` of their starts can break the limits."""
        windows = [kind.window(width) for kind in self.kinds]
        return sum(window[0] for window in windows) < self.low or sum(window[-1] for window in windows) > self.high


class _Step(NamedTuple):
    """Store one kind's count, or (`kind` is `None`) the end of a block whose pieces are tracked."""

    # Number of pieces taken in the block so far (0 where it is not tracked) -> the sums that are possible before
    before: dict[int, int]
    block: int
    place: int = 0
    kind: Pieces | None = None
    window: range = range(0)
    tracked: bool = False


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """Return a random order from `random()` alone, which gives the same numbers in every Python."""
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
    nearer = counts and abs(_total(blocks, counts) - goal) <= abs(_total(blocks, others) - goal)
    return counts if nearer else others


def _total(blocks: Sequence[Block], counts: Sequence[Sequence[int]]) -> int:
    rows = zip(blocks, counts, strict=True)
    return sum(kind.size * count for block, row in rows for kind, count in zip(block.kinds, row, strict=True))


def _large_first(blocks: Sequence[Block], goal: Fraction, tolerance: Fraction, rng: random.Random) -> list[list[int]]:
    """Choose counts of the large kinds first, as many as one search can hold, then of the others."""
    smallest = _smallest_together([kind for block in blocks for kind in block.kinds])
    small = [tuple(kind for kind in block.kinds if kind.size < smallest) for block in blocks]
    large = [
        Block(block.kinds[len(later) :], block.low - sum(kind.number for kind in later), block.high)
        for block, later in zip(blocks, small, strict=True)
    ]
    later = sum(kind.size * kind.start for kinds in small for kind in kinds)
    counts, _ = _solve(large, goal - later, tolerance, rng)
    if not any(small):
        return counts
    rest = [
        Block(kinds, block.low - sum(row), block.high - sum(row))
        for kinds, block, row in zip(small, blocks, counts, strict=True)
    ]
    others = _large_first(rest, goal - _total(large, counts), tolerance, rng)
    return [first + second for first, second in zip(others, counts, strict=True)]


def _smallest_together(kinds: Sequence[Pieces]) -> int:
    """Return the smallest size down to which the sums of all kinds have few enough bits."""
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
    """Return counts within the least sufficient width, and whether no others are nearer."""
    kinds = [kind for block in blocks for kind in block.kinds]
    unit = math.gcd(*(kind.size for kind in kinds))
    aim = goal / unit
    # Nothing comes nearer than this, limits or no limits
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
    while width < 2 * max(kind.number for kind in kinds):
        bits = sum(kind.size // unit * (len(kind.window(width)) - 1) for kind in kinds)
        tracked = max((sum(kind.number for kind in block.kinds) for block in blocks if block.binds(width)), default=0)
        if bits > _MAX_BITS or (width and bits * tracked > _MAX_TRACKED):
            return best, False
        base, sums, steps = _search(blocks, unit, width)
        for total in shuffled(_neighbours(sums, aim - base), rng):
            if miss is None or abs(base + total - aim) < miss:
                miss, best = abs(base + total - aim), _trace(blocks, steps, unit, total, rng)
        if miss is not None and miss <= bound:
            break
        width = 2 * width + 1
    return best, True


def _search(blocks: Sequence[Block], unit: int, width: int) -> tuple[int, int, list[_Step]]:
    """Return the least sum within `width`, the possible sums above it, and the steps to them."""
    base, rows = 0, {0: 1}
    steps = []
    for index, block in enumerate(blocks):
        tracked = block.binds(width)
        for place, kind in enumerate(block.kinds):
            window, size = kind.window(width), kind.size // unit
            steps.append(_Step(rows, index, place, kind, window, tracked))
            base += window[0] * size
            if not tracked:
                rows = {0: _add(rows[0], size, len(window) - 1)}
                continue
            following: dict[int, int] = {}
            for taken, sums in rows.items():
                for more, count in enumerate(window):
                    following[taken + count] = following.get(taken + count, 0) | sums << (more * size)
            rows = following
        if tracked:
            rows = {taken: sums for taken, sums in rows.items() if block.low <= taken <= block.high}
            steps.append(_Step(rows, index))
            together = 0
            for sums in rows.values():
                together |= sums
            rows = {0: together}
    return base, rows[0], steps


def _trace(
    blocks: Sequence[Block], steps: Sequence[_Step], unit: int, total: int, rng: random.Random
) -> list[list[int]]:
    """Return counts that add up to `total`, each as near to its start as the earlier ones allow."""
    counts = [[0] * len(block.kinds) for block in blocks]
    taken = 0
    for before, block, place, kind, window, tracked in reversed(steps):
        if kind is None:
            middle = sum(kind.start for kind in blocks[block].kinds)
            possible = [number for number, sums in before.items() if sums >> total & 1]
            taken = min(shuffled(possible, rng), key=lambda number: abs(number - middle))
            continue
        for count in sorted(shuffled(window, rng), key=lambda count: abs(count - kind.start)):
            rest = total - (count - window[0]) * (kind.size // unit)
            number = taken - count * tracked
            if rest >= 0 and before.get(number, 0) >> rest & 1:
                counts[block][place] = count
                total, taken = rest, number
                break
    return counts


def _add(sums: int, size: int, most: int) -> int:
    """Return the sums that up to `most` pieces of `size` make of `sums`."""
    some = 1
    while most:
        some = min(some, most)
        sums |= sums << (some * size)
        most -= some
        some *= 2
    return sums


def _neighbours(sums: int, aim: Fraction) -> list[int]:
    """Return the greatest sum not above `aim` and the least one above it, if they exist."""
    split = max(0, math.floor(aim) + 1)
    below, above = sums & ((1 << split) - 1), sums >> split
    return [below.bit_length() - 1] * bool(below) + [split + (above & -above).bit_length() - 1] * bool(above)
