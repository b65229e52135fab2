"""How far layers and categories moved from the base model, gathered for pictures and tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from hft_trl.report.layer_map import Column, columns_of
from hft_trl.report.record import UnitChange
from hft_trl.selection import LAYER_CATEGORIES, OUTER_CATEGORIES


@dataclass(frozen=True)
class CategoryMovement:
    """
    Mean relative change of a category's units, apart for those that learned in the stage and those that did not.

    Args:
        category (`str`):
            The category.
        learned, frozen (`float`, *optional*):
            Mean over the units of `||w - w_base|| / ||w_base||`, `None` without such a unit.
        learned_units, frozen_units (`int`):
            Number of units in each mean.
    """

    category: str
    learned: float | None
    frozen: float | None
    learned_units: int
    frozen_units: int


@dataclass(frozen=True)
class Cell:
    """
    One cell of the layer picture: a slot of a layer, or several slots folded into one column.

    Args:
        change (`float`):
            Mean relative change of its units from the base model.
        frozen (`bool`):
            Whether none of its units learned in the stage.
    """

    change: float
    frozen: bool


@dataclass(frozen=True)
class MovementGrid:
    """
    The layer picture of a stage.

    Args:
        columns (`list[Column]`):
            Columns, grouped by category.
        layers (`list[int]`):
            Running numbers of the layers.
        cells (`dict[tuple[int, Column], Cell]`):
            The cells that exist, by layer and column.
    """

    columns: list[Column]
    layers: list[int]
    cells: dict[tuple[int, Column], Cell]


def category_movement(moved: Iterable[UnitChange]) -> list[CategoryMovement]:
    """
    Average the movement from the base model by category.

    Args:
        moved (`Iterable[UnitChange]`):
            The units, such as a stage's `moved`.

    Returns:
        `list[CategoryMovement]`: The categories inside the layers, then those outside.
    """
    known = [unit for unit in moved if unit.relative_change is not None]
    present = {unit.category for unit in known}
    order = [category for category in LAYER_CATEGORIES + OUTER_CATEGORIES if category in present]
    order += sorted(present.difference(order))
    rows = []
    for category in order:
        learned = [unit for unit in known if unit.category == category and unit.trainable]
        frozen = [unit for unit in known if unit.category == category and not unit.trainable]
        rows.append(CategoryMovement(category, _mean(learned), _mean(frozen), len(learned), len(frozen)))
    return rows


def movement_grid(moved: Iterable[UnitChange]) -> MovementGrid:
    """
    Arrange the movement of the layers' units by layer and slot.

    Args:
        moved (`Iterable[UnitChange]`):
            The units, such as a stage's `moved`.

    Returns:
        [`MovementGrid`]: The grid, without units whose change is undefined; without cells where no unit is left.
    """
    inner = [unit for unit in moved if unit.layer is not None and unit.relative_change is not None]
    columns = columns_of((unit.category, unit.slot) for unit in inner)
    members: dict[tuple[int, Column], list[UnitChange]] = {}
    for unit in inner:
        members.setdefault((unit.layer, columns[unit.category, unit.slot]), []).append(unit)
    cells = {
        place: Cell(fmean(unit.relative_change for unit in units), not any(unit.trainable for unit in units))
        for place, units in members.items()
    }
    return MovementGrid(list(dict.fromkeys(columns.values())), sorted({unit.layer for unit in inner}), cells)


def _mean(units: Iterable[UnitChange]) -> float | None:
    changes = [unit.relative_change for unit in units]
    return fmean(changes) if changes else None
