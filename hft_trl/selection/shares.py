"""How much of a model learns."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hft_trl.selection.categories import LAYER_CATEGORIES, OUTER_CATEGORIES
from hft_trl.selection.units import Unit


@dataclass(frozen=True)
class CategoryShare:
    """The part of a category, of `"layers"` or of `"model"` that learns, in numbers of units and parameters."""

    category: str
    units: int
    parameters: int
    trained: int

    @property
    def share(self) -> float:
        """The trained part of the parameters, in [0, 1]."""
        return self.trained / self.parameters if self.parameters else 0.0


def category_shares(
    units: Iterable[Unit], trainable: Collection[str], masked: Mapping[str, int] | None = None
) -> list[CategoryShare]:
    """
    Count what learns by category: those in the layers, `"layers"`, those outside, `"model"`.

    `masked` has the number of elements that learn, for parameters that learn in part. Empty categories are left out.
    """
    units, names, elements = list(units), frozenset(trainable), masked or {}

    def learning(unit: Unit) -> int:
        if unit.names[0] in elements:
            return sum(elements[name] for name in unit.names)
        return unit.size if unit.names[0] in names else 0

    def count(category: str, members: list[Unit]) -> CategoryShare:
        return CategoryShare(category, len(members), sum(unit.size for unit in members), sum(map(learning, members)))

    def counts(categories: Sequence[str]) -> list[CategoryShare]:
        return [count(category, [unit for unit in units if unit.category == category]) for category in categories]

    layers = count("layers", [unit for unit in units if unit.layer is not None])
    rows = [*counts(LAYER_CATEGORIES), layers, *counts(OUTER_CATEGORIES), count("model", units)]
    return [row for row in rows if row.units]


def share_of(
    units: Iterable[Unit], trainable: Collection[str], masked: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Return the share that learns of each category in the layers, of `"layers"` and of `"model"`, in 0 to 1."""
    rows = category_shares(units, trainable, masked)
    return {row.category: row.share for row in rows if row.category not in OUTER_CATEGORIES}
