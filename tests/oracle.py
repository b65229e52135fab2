"""How near to a goal a subset of units can come, worked out in other ways than the package does it."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import product

from hft_trl.selection import Unit

MAX_BITS = 1 << 27


def by_layer(units: Iterable[Unit]) -> dict[int, list[Unit]]:
    layers = defaultdict(list)
    for unit in units:
        layers[unit.layer].append(unit)
    return dict(layers)


def one_sided_layers(units: Iterable[Unit], chosen: set[Unit]) -> list[int]:
    """Layers that have a choice and are wholly frozen or wholly trained."""
    return [
        layer for layer, own in by_layer(units).items() if len(own) > 1 and len({unit in chosen for unit in own}) == 1
    ]


def least_miss(units: Sequence[Unit], goal: Fraction) -> tuple[Fraction, int]:
    """
    Distance from `goal` to the nearest sum of any subset, and by how much it may be too small.

    The second is not 0 where the sums have too many bits. The smallest units are then left out, and since they may add
    anything from nothing to all that they have, the distance is a lower bound.
    """
    sizes = sorted((unit.size for unit in units), reverse=True)
    dust = 0
    while sum(sizes) // math.gcd(*sizes) > MAX_BITS:
        smallest = sizes[-1]
        while sizes[-1] == smallest:
            dust += sizes.pop()
    step = math.gcd(*sizes)
    sums = 1
    for size, number in Counter(sizes).items():
        for some in _binary_parts(number):
            sums |= sums << (some * size // step)
    miss = _distance(sums, Fraction(goal, step)) * step
    # The best sum of the large ones for the goal less what the small ones add, anywhere between nothing and all.
    other = _distance(sums, Fraction(goal - dust, step)) * step
    return max(Fraction(0), min(miss, other) - dust), 2 * dust


def least_miss_with_balanced_layers(units: Sequence[Unit], goal: Fraction) -> Fraction:
    """The same over subsets that leave no layer with two or more units wholly frozen or wholly trained."""
    step = math.gcd(*(unit.size for unit in units))
    sums = 1
    for own in by_layer(units).values():
        kinds = Counter(unit.size // step for unit in own).items()
        longer = 0
        for counts in product(*(range(number + 1) for _, number in kinds)):
            if len(own) == 1 or 0 < sum(counts) < len(own):
                longer |= sums << sum(count * size for count, (size, _) in zip(counts, kinds, strict=True))
        sums = longer
    return _distance(sums, Fraction(goal, step)) * step


def _binary_parts(number: int) -> Iterable[int]:
    some = 1
    while number:
        some = min(some, number)
        yield some
        number -= some
        some *= 2


def _distance(sums: int, aim: Fraction) -> Fraction:
    split = max(0, math.floor(aim) + 1)
    below, above = sums & ((1 << split) - 1), sums >> split
    candidates = [aim - (below.bit_length() - 1)] * bool(below)
    candidates += [split + (above & -above).bit_length() - 1 - aim] * bool(above)
    return min(candidates)
