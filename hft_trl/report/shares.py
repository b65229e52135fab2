"""Compute how much of each category learns."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hft_trl.selection import LAYER_CATEGORIES, OUTER_CATEGORIES, Unit
from hft_trl.selection.shares import learning_elements


@dataclass(frozen=True)
class CategoryShare:
    """Store the numbers of units, parameters and trained parameters of a category."""

    category: str
    units: int
    parameters: int
    trained: int

    @property
    def share(self) -> float:
        """Return the trained share of the parameters, in [0, 1]."""
        return self.trained / self.parameters if self.parameters else 0.0


def category_shares(
    units: Iterable[Unit], trainable: Collection[str], masked: Mapping[str, int] | None = None
) -> list[CategoryShare]:
    """Count what learns by category. `masked` has numbers of elements of partly trained parameters."""
    units, names = list(units), frozenset(trainable)

    def count(category: str, members: list[Unit]) -> CategoryShare:
        trained = sum(learning_elements(unit, names, masked or {}) for unit in members)
        return CategoryShare(category, len(members), sum(unit.size for unit in members), trained)

    inner = [count(category, [unit for unit in units if unit.category == category]) for category in LAYER_CATEGORIES]
    outer = [count(category, [unit for unit in units if unit.category == category]) for category in OUTER_CATEGORIES]
    layers = count("layers", [unit for unit in units if unit.layer is not None])
    rows = [*inner, layers, *outer, count("model", units)]
    return [row for row in rows if row.units]
