"""Compute, tabulate and draw how far layers and categories moved."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import TYPE_CHECKING

from hft_trl.report.figures import BLUE, PALE_TO_DARK
from hft_trl.report.layer_map import LayerMap, category_rank, layer_map
from hft_trl.report.record import Report, UnitChange
from hft_trl.report.tables import Grid, change, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

EDGE, ABSENT = "#4D4D4D", "#DDDDDD"
HATCH = "////"


@dataclass(frozen=True)
class CategoryMovement:
    """Store the mean of `||w - w_base|| / ||w_base||` of learned and frozen units, `None` without units."""

    category: str
    learned: float | None
    frozen: float | None
    learned_in_stage: float | None  # from the model that the stage started from
    frozen_in_stage: float | None
    learned_units: int
    frozen_units: int


def category_movement(moved: Iterable[UnitChange]) -> list[CategoryMovement]:
    """Average the movement from the base model by category: first those inside the layers."""
    known = [unit for unit in moved if unit.relative_change is not None]
    rows = []
    for category in sorted({unit.category for unit in known}, key=category_rank):
        members = [unit for unit in known if unit.category == category]
        parts = [[unit for unit in members if unit.trainable == learns] for learns in (True, False)]
        from_base = [_mean(unit.relative_change for unit in part) for part in parts]
        in_stage = [_mean(unit.relative_change_from_start for unit in part) for part in parts]
        rows.append(CategoryMovement(category, *from_base, *in_stage, *map(len, parts)))
    return rows


def _mean(changes: Iterable[float | None]) -> float | None:
    changes = list(changes)
    return fmean(changes) if changes and None not in changes else None


def movement_grids(report: Report) -> list[Grid]:
    """Return how far each category moved from the base and, where it began elsewhere, in the stage itself."""
    grids = []
    for stage in report.stages:
        moves = category_movement(stage.moved)
        later = any(unit.relative_change_from_start not in (unit.relative_change, None) for unit in stage.moved)
        changes = ["change from the base", f"change in {stage.name}"][: 1 + later]
        rows = []
        for row in moves:
            learned = [change(value) for value in (row.learned, row.learned_in_stage)[: 1 + later]]
            frozen = [change(value) for value in (row.frozen, row.frozen_in_stage)[: 1 + later]]
            rows.append([row.category, count(row.learned_units), *learned, count(row.frozen_units), *frozen])
        if rows:
            columns = ["category", "units that learned", *changes, "frozen units", *changes]
            title = f"Change after {stage.name}: mean of ||w - w_0|| / ||w_0|| over units"
            grids.append(Grid(title, columns, rows))
    return grids


def movement_figure(report: Report) -> "Figure | None":
    """Draw all stages on one scale. Return `None` without any movement."""
    return change_figure([(f"after {stage.name} ({stage.method.upper()})", stage.moved) for stage in report.stages])


def change_figure(models: Iterable[tuple[str, Sequence[UnitChange]]]) -> "Figure | None":
    """
    Draw how far models moved from their base, a heat map and bars for each, on one scale.

    `models` are pairs of a title and units. White cells equal the base, and hatched ones were frozen in the stage.
    Return `None` without any movement.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    models = [(title, moved) for title, moved in models if category_movement(moved)]
    if not models:
        return None
    categories = [category_movement(moved) for _, moved in models]
    grids = [layer_map(unit for unit in moved if unit.relative_change is not None) for _, moved in models]
    changes = sorted(_mean(unit.relative_change for unit in units) for grid in grids for units in grid.cells.values())
    # The scale ends at the 99th percentile, so that one outlier does not make all other cells pale
    top = changes[min(len(changes) - 1, int(0.99 * len(changes)))] if changes else 0.0
    norm = Normalize(0.0, top or 1.0)
    colours, percents = colormaps[PALE_TO_DARK], PercentFormatter(1, symbol=" %")

    columns, layers = max(len(grid.columns) for grid in grids), max(len(grid.layers) for grid in grids)
    width = min(16.0, max(5.4, 2.4 + 0.3 * columns))
    across = max(1, min(len(models), int(17 // width)))
    down = ceil(len(models) / across)
    map_height = min(11.0, 2.4 + 0.19 * layers) if columns else 0.01
    bar_height = 0.9 + 0.3 * max(map(len, categories))
    longest = max(value or 0 for rows in categories for row in rows for value in (row.learned, row.frozen))
    figure = Figure(figsize=(width * across, 0.9 + (map_height + bar_height) * down), layout="constrained")
    parts = figure.subfigures(down, across, squeeze=False).ravel()
    for (title, _), rows, grid, part in zip(models, categories, grids, parts, strict=False):
        part.suptitle(title, fontweight="bold")
        if grid.cells:
            upper, lower = part.subplots(2, 1, height_ratios=[map_height, bar_height])
            _heat_map(upper, grid, colours, norm)
            beyond = "max" if changes[-1] > top else "neither"
            aspect = max(20, 6 * map_height)  # the same width for any number of layers
            bar = {"extend": beyond, "extendfrac": 0.03, "pad": 0.02, "aspect": aspect, "format": percents}
            part.colorbar(ScalarMappable(norm, colours), ax=upper, label="change from the base", **bar)
        else:
            lower = part.subplots()
        _bars(lower, rows, longest)
        lower.xaxis.set_major_formatter(percents)
    handles = [Patch(facecolor="white", edgecolor=EDGE, label="exactly as in the base")] if changes else []
    if any(row.frozen_units for rows in categories for row in rows):
        handles.append(Patch(facecolor="white", edgecolor=EDGE, hatch=HATCH, label="frozen in this stage"))
    if any(len(grid.cells) < len(grid.columns) * len(grid.layers) for grid in grids):
        handles.append(Patch(facecolor=ABSENT, label="no such matrix"))
    if handles:
        abreast = len(handles) if width * across > 7 else 2
        figure.legend(handles=handles, loc="outside lower center", ncols=abreast, frameon=False)
    return figure


def _heat_map(axes: "Axes", grid: LayerMap[UnitChange], colours: "Colormap", norm: "Normalize") -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    rows = {layer: row for row, layer in enumerate(grid.layers)}
    places = {column: place for place, column in enumerate(grid.columns)}
    axes.set_facecolor(ABSENT)
    plain, hatched = [], []
    for (layer, column), units in grid.cells.items():
        moved = _mean(unit.relative_change for unit in units)
        corner = (places[column] - 0.5, rows[layer] - 0.5)
        cell = Rectangle(corner, 1, 1, facecolor=colours(norm(moved)) if moved else "white")
        (plain if any(unit.trainable for unit in units) else hatched).append(cell)
    line = 0.5 if len(grid.layers) <= 40 else 0.2
    if plain:
        axes.add_collection(PatchCollection(plain, match_original=True, edgecolor="white", linewidth=line))
    if hatched:
        collection = PatchCollection(hatched, match_original=True, linewidth=line)
        collection.set_edgecolor("#9A9A9A")
        collection.set_hatch(HATCH)
        axes.add_collection(collection)

    axes.set_xlim(-0.5, len(grid.columns) - 0.5)
    axes.set_ylim(len(grid.layers) - 0.5, -0.5)
    every = max(1, ceil(len(grid.layers) / 28))
    axes.set_yticks(range(0, len(grid.layers), every), [str(layer) for layer in grid.layers[::every]])
    axes.set_ylabel("layer")
    small = 9 if len(grid.columns) <= 40 else 7
    axes.set_xticks(range(len(grid.columns)), [column.label for column in grid.columns], rotation=90, fontsize=small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    first = 0
    for category, members in grid.groups.items():
        if first:
            axes.axvline(first - 0.5, color="black", linewidth=1.5)
        middle, above = first + (len(members) - 1) / 2, {"xycoords": ("data", "axes fraction"), "ha": "center"}
        text = category.replace("_", "\n")
        axes.annotate(text, (middle, 1), (0, 4), textcoords="offset points", va="bottom", fontsize=9, **above)
        first += len(members)


def _bars(axes: "Axes", rows: list[CategoryMovement], longest: float) -> None:
    for place, row in enumerate(rows):
        present = [pair for pair in (("learned", row.learned), ("frozen", row.frozen)) if pair[1] is not None]
        height = 0.8 / len(present)
        for number, (kind, value) in enumerate(present):
            middle = place - 0.4 + height * (number + 0.5)
            hatched = {"facecolor": "white", "edgecolor": EDGE, "hatch": HATCH}
            axes.barh(middle, value, 0.9 * height, **({"color": BLUE} if kind == "learned" else hatched))
            axes.annotate(
                f"{kind}: {change(value)}",
                (value, middle),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(rows)), [row.category.replace("_", " ") for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * longest or 1.0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("mean change from the base,\n||w - w_base|| / ||w_base||")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
