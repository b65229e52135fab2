"""Which single elements of the parameters learn: how many of each, and masks that can be drawn again."""

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from hft_trl.errors import HFTError
from hft_trl.selection.counts import shuffled
from hft_trl.selection.units import Unit


@dataclass(frozen=True)
class Masks:
    """Store which elements of parameters learn, as numbers that draw the masks again."""

    seed: int  # each parameter has its own generator, by the seed and its name
    learning: dict[str, int]  # number of elements that learn, by parameter name
    digests: dict[str, str]  # SHA-256 (hex) of each drawn mask
    inverted: bool = False  # whether the drawn elements are frozen and the others learn

    def draw(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Draw the mask of a parameter again, on the CPU: `True` where an element learns."""
        size, learning = math.prod(shape), self.learning[name]
        mask = _draw(self.seed, name, size, size - learning if self.inverted else learning)
        if _digest(mask) != self.digests[name]:
            raise HFTError(
                f"the mask of {name} cannot be drawn again: torch {torch.__version__} draws other numbers here than "
                "where the selection was made, so use the torch of that machine."
            )
        return (~mask if self.inverted else mask).view(tuple(shape))

    def of(self, names: Iterable[str]) -> "Masks":
        """Return the masks of these parameters, of those that have one."""
        wanted, tables = set(names), ("learning", "digests")
        kept = {key: {name: value for name, value in vars(self)[key].items() if name in wanted} for key in tables}
        return replace(self, **kept)

    def complement(self, sizes: Mapping[str, int]) -> "Masks":
        """Return the masks of the elements that these keep frozen. `sizes` has the numbers of elements."""
        learning = {name: sizes[name] - number for name, number in self.learning.items()}
        return replace(self, learning=learning, inverted=not self.inverted)


def draw_masks(units: Iterable[Unit], ratio: float, seed: int, sizes: Mapping[str, int]) -> Masks:
    """
    Draw masks for the parameters of all units in layers.

    Of each category `ratio` of the elements learn, rounded to one element; of each parameter the same share, rounded
    down or up by the largest remainders. `sizes` holds the number of elements of each parameter.
    """
    categories: dict[str, list[str]] = defaultdict(list)
    for unit in units:
        if unit.layer is not None:
            categories[unit.category].extend(unit.names)
    learning: dict[str, int] = {}
    for category, names in sorted(categories.items()):
        learning |= _counts({name: sizes[name] for name in sorted(names)}, ratio, random.Random(f"{seed}/{category}"))
    digests = {name: _digest(_draw(seed, name, sizes[name], number)) for name, number in learning.items()}
    return Masks(seed, learning, digests)


def _counts(sizes: Mapping[str, int], ratio: float, rng: random.Random) -> dict[str, int]:
    share = Fraction(str(ratio))
    counts = {name: math.floor(share * size) for name, size in sizes.items()}
    missing = math.floor(share * sum(sizes.values()) + Fraction(1, 2)) - sum(counts.values())
    by_remainder = sorted(shuffled(list(sizes), rng), key=lambda name: -(share * sizes[name] % 1))
    for name in by_remainder[:missing]:
        counts[name] += 1
    return counts


def _draw(seed: int, name: str, size: int, number: int) -> torch.Tensor:
    """Draw `number` of `size` elements: those with the lowest random numbers, of equal ones the first."""
    if not 0 < number < size:
        return torch.full((size,), number > 0)
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(own_seed)
    numbers = torch.empty(size, dtype=torch.int32).random_(generator=generator)
    threshold = numbers.kthvalue(number).values
    mask = numbers < threshold
    ties = (numbers == threshold).nonzero().squeeze(1)
    mask[ties[: number - int(mask.sum())]] = True
    return mask


def _digest(mask: torch.Tensor) -> str:
    return hashlib.sha256(memoryview(mask.numpy())).hexdigest()
