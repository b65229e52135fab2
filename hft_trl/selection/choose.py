"""
Choose which units learn: a pure function of units, ratio and seed.

With strategy "category" the layers of a category are grouped by their signature: their units and the size of each. The
first step counts how many units of every size learn in every group, such that the parameters that learn come as near
to the ratio as possible. The second step fills a 0/1 matrix of layers by units with even row sums (units that learn in
a layer) and column sums (layers that a unit learns in). Strategy "importance" has the same first step; then the units
of highest score of each size learn.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from hft_trl.selection.counts import Block, Pieces, nearest_counts, shuffled
from hft_trl.selection.units import Unit

HALF = Fraction(1, 2)


def choose(
    units: Iterable[Unit],
    ratio: float,
    strategy: str,
    seed: int,
    learned: Collection[int] = (),
    scores: Mapping[Unit, float] | None = None,
) -> list[Unit]:
    """
    Choose the units in layers that learn, sorted by layer and slot.

    The result depends on the arguments alone: not on the order of `units`, the machine, `PYTHONHASHSEED` or any global
    random state. Units outside of the layers are ignored. `learned` are the layers of the stage before, which
    `"layer"` avoids as far as the ratio allows. Of equal `scores` the seed decides.
    """
    pool = sorted((unit for unit in units if unit.layer is not None), key=lambda unit: (unit.layer, unit.slot))
    # The decimal that was written, not the binary number next to it: 0.3 of 10 is 3
    share = Fraction(str(ratio))
    if share == 1:
        return pool
    if strategy == "layer":
        chosen = _whole_layers(pool, share, random.Random(f"{seed}/layer"), learned)
    elif strategy == "model":
        chosen = _any_units(pool, share, random.Random(f"{seed}/model"))
    else:
        categories = defaultdict(list)
        for unit in pool:
            categories[unit.category].append(unit)
        # A generator for each category: what is chosen in one does not depend on the others
        ranks = scores if strategy == "importance" else None
        generators = {name: random.Random(f"{seed}/{name}") for name in categories}
        chosen = set().union(*(_of_category(categories[n], share, rng, ranks) for n, rng in generators.items()))
    return [unit for unit in pool if unit in chosen]


def _tolerance(share: Fraction, total: int) -> Fraction:
    """Return the allowed distance from the goal: 0 for one half, else a thousandth of `total`."""
    return Fraction(0) if share == HALF else Fraction(total, 1000)


def _whole_layers(units: Sequence[Unit], share: Fraction, rng: random.Random, learned: Collection[int]) -> set[Unit]:
    """Choose layers at even distances, at random or with as few that learned before as possible."""
    layers = sorted({unit.layer for unit in units})

    def taken(offset: Fraction) -> set[int]:
        ends = [math.floor(place * share + offset) for place in range(len(layers) + 1)]
        return {layer for layer, (before, after) in zip(layers, pairwise(ends), strict=True) if after > before}

    if learned:
        # Between two of these offsets the layers are the same ones
        ways = [taken(offset) for offset in sorted({-place * share % 1 for place in range(len(layers) + 1)})]
        fewest = min(len(way.intersection(learned)) for way in ways)
        learning = rng.choice([way for way in ways if len(way.intersection(learned)) == fewest])
    else:
        learning = taken(Fraction(rng.random()))
    return {unit for unit in units if unit.layer in learning}


def _any_units(units: Sequence[Unit], share: Fraction, rng: random.Random) -> set[Unit]:
    """Take units in random order until the share is reached, then adjust the counts of each size."""
    everything = sum(unit.size for unit in units)
    goal = share * everything
    drawn: Counter[int] = Counter()
    total = 0
    by_size = defaultdict(list)
    for unit in shuffled(units, rng):
        by_size[unit.size].append(unit)
        if total < goal:
            drawn[unit.size] += 1
            total += unit.size
    rows = [by_size[size] for size in sorted(by_size)]
    kinds = [Pieces(row[0].size, len(row), Fraction(drawn[row[0].size])) for row in rows]
    blocks = [Block((kind,), 0, kind.number) for kind in kinds]
    counts = nearest_counts(blocks, goal, _tolerance(share, everything), rng)
    return {unit for row, (count,) in zip(rows, counts, strict=True) for unit in row[:count]}


def _of_category(
    units: Sequence[Unit], share: Fraction, rng: random.Random, scores: Mapping[Unit, float] | None
) -> set[Unit]:
    layers: dict[int, list[Unit]] = defaultdict(list)
    for unit in units:
        layers[unit.layer].append(unit)
    alike: dict[tuple[tuple[str, int], ...], list[list[Unit]]] = defaultdict(list)
    for number in sorted(layers):
        alike[tuple((unit.slot, unit.size) for unit in layers[number])].append(layers[number])

    blocks = []
    for signature, group in alike.items():
        width, depth = len(signature), len(group)
        slots_of_size = Counter(size for _, size in signature)
        classes = [Pieces(size, slots * depth, share * slots * depth) for size, slots in sorted(slots_of_size.items())]
        # At one half no layer with a choice is wholly frozen or wholly trained
        spared = depth if share == HALF and width > 1 else 0
        blocks.append(Block(tuple(classes), spared, depth * width - spared))

    chosen: set[Unit] = set()
    total = sum(unit.size for unit in units)
    counts_of_block = nearest_counts(blocks, share * total, _tolerance(share, total), rng)
    if scores is not None:
        number: Counter[int] = Counter()
        for block, counts in zip(blocks, counts_of_block, strict=True):
            number.update({kind.size: count for kind, count in zip(block.kinds, counts, strict=True)})
        by_size = defaultdict(list)
        for unit in sorted(shuffled(units, rng), key=lambda unit: -scores[unit]):
            by_size[unit.size].append(unit)
        return {unit for size, ranked in by_size.items() for unit in ranked[: number[size]]}
    for (signature, group), block, counts in zip(alike.items(), blocks, counts_of_block, strict=True):
        need = [0] * len(signature)
        for pieces, count in zip(block.kinds, counts, strict=True):
            slots = shuffled([place for place, (_, size) in enumerate(signature) if size == pieces.size], rng)
            for rank, place in enumerate(slots):
                need[place] = count // len(slots) + (rank < count % len(slots))
        chosen.update(_fill(group, need, rng))
    return chosen


def _fill(group: Sequence[Sequence[Unit]], need: list[int], rng: random.Random) -> Iterator[Unit]:
    """
    Take the unit at place `i` in `need[i]` layers, as evenly over the layers as possible.

    A layer takes the units that are needed most. This never runs dry: rows of equal sums can be filled to any column
    sums (Gale and Ryser), whatever the order of the rows. Two layers of equal sums in a row are near complements.
    """
    per_layer, extra = divmod(sum(need), len(group))
    for rank, layer in enumerate(shuffled(group, rng)):
        places = sorted(range(len(need)), key=lambda place: (-need[place], rng.random()))
        for place in places[: per_layer + (rank < extra)]:
            need[place] -= 1
            yield layer[place]
