"""How much of a model learns."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hft_trl.selection.categories import LAYER_CATEGORIES, OUTER_CATEGORIES
from hft_trl.selection.units import Unit


def learning_elements(unit: Unit, trainable: Collection[str], masked: Mapping[str, int]) -> int:
    """How many elements of a unit learn, given the parameters that do and the numbers for those that do in part."""
    if unit.names[0] not in trainable:
        return 0
    return sum(masked[name] for name in unit.names) if unit.names[0] in masked else unit.size


def share_of(
    units: Iterable[Unit], trainable: Iterable[str], masked: Mapping[str, int] | None = None
) -> dict[str, float]:
    """
    Return the share of each category, of `"layers"` and of `"model"` that learns, in 0 to 1.

    `masked` holds the number of elements that learn of parameters that learn in part.
    """
    learning = set(trainable)
    counts: dict[str, tuple[int, int]] = {}
    for unit in units:
        learns = learning_elements(unit, learning, masked or {})
        for key in ("model",) if unit.layer is None else (unit.category, "layers", "model"):
            before = counts.get(key, (0, 0))
            counts[key] = (before[0] + learns, before[1] + unit.size)
    return {key: counts[key][0] / counts[key][1] for key in (*LAYER_CATEGORIES, "layers", "model") if key in counts}


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
    units, names = list(units), frozenset(trainable)

    def count(category: str, members: list[Unit]) -> CategoryShare:
        trained = sum(learning_elements(unit, names, masked or {}) for unit in members)
        return CategoryShare(category, len(members), sum(unit.size for unit in members), trained)

    inner = [count(category, [unit for unit in units if unit.category == category]) for category in LAYER_CATEGORIES]
    outer = [count(category, [unit for unit in units if unit.category == category]) for category in OUTER_CATEGORIES]
    layers = count("layers", [unit for unit in units if unit.layer is not None])
    rows = [*inner, layers, *outer, count("model", units)]
    return [row for row in rows if row.units]
