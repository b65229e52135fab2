"""How much of a model learns."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hft_trl.selection.categories import LAYER_CATEGORIES, OUTER_CATEGORIES
from hft_trl.selection.units import Unit


@dataclass(frozen=True)
class CategoryShare:
    """Store how many units and parameters of a category, of `"layers"` or of `"model"` learn."""

    category: str
    units: int
    parameters: int
    trained: int

    @property
    def share(self) -> float:
        """Return the trained part of the parameters, in [0, 1]."""
        return self.trained / self.parameters if self.parameters else 0.0


def category_shares(
    units: Iterable[Unit], trainable: Collection[str], masked: Mapping[str, int] | None = None
) -> list[CategoryShare]:
    """
    Count what learns by category: those in the layers, `"layers"`, those outside, `"model"`.

    `masked` has the number of elements that learn, for parameters that learn in part. Empty categories are left out.
    """
    names, elements = frozenset(trainable), masked or {}
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for unit in units:
        size = sum(elements[name] for name in unit.names) if unit.names[0] in elements else unit.size
        learns = unit.names[0] in names
        for category in (unit.category, "model") if unit.layer is None else (unit.category, "layers", "model"):
            totals[category].update(units=1, parameters=unit.size, trained=size if learns else 0)
    order = (*LAYER_CATEGORIES, "layers", *OUTER_CATEGORIES, "model")
    return [CategoryShare(category, **totals[category]) for category in order if category in totals]
