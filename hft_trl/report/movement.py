"""Tabulate how far categories moved, and draw how far layers did."""

from collections.abc import Iterable, Sequence
from math import ceil
from statistics import fmean
from typing import TYPE_CHECKING

from hft_trl.report.figures import PALE_TO_DARK
from hft_trl.report.layer_map import LayerMap, category_rank, layer_map
from hft_trl.report.record import Report, UnitChange
from hft_trl.report.tables import Grid, change, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

EDGE, ABSENT = "#4D4D4D", "#DDDDDD"
HATCH = "////"


def movement_grids(report: Report) -> list[Grid]:
    """Return how far each category moved from the base and, where it began elsewhere, in the stage itself."""
    grids = []
    for stage in report.stages:
        known = [unit for unit in stage.moved if unit.relative_change is not None]
        later = any(unit.relative_change_from_start not in (unit.relative_change, None) for unit in known)
        changes = ["change from the base", f"change in {stage.name}"][: 1 + later]
        rows = []
        for category in sorted({unit.category for unit in known}, key=category_rank):
            row = [category]
            for learned in (True, False):
                part = [unit for unit in known if unit.category == category and unit.trainable == learned]
                moves = [(unit.relative_change, unit.relative_change_from_start)[: 1 + later] for unit in part]
                means = map(_mean, zip(*moves, strict=True)) if moves else [None] * len(changes)
                row += [count(len(part)), *map(change, means)]
            rows.append(row)
        if rows:
            columns = ["category", "units that learned", *changes, "frozen units", *changes]
            title = f"Change after {stage.name}: mean of ||w - w_0|| / ||w_0|| over units"
            grids.append(Grid(title, columns, rows))
    return grids


def _mean(changes: Iterable[float | None]) -> float | None:
    changes = list(changes)
    return None if None in changes else fmean(changes)


def movement_figure(report: Report) -> "Figure | None":
    """Draw all stages on one scale. Return `None` if no layer has a known change."""
    return change_figure([(f"after {stage.name} ({stage.method.upper()})", stage.moved) for stage in report.stages])


def change_figure(models: Iterable[tuple[str, Sequence[UnitChange]]]) -> "Figure | None":
    """
    Draw how far the layers of models moved from their base, a heat map for each, on one scale.

    `models` are pairs of a title and units. White cells equal the base, and hatched ones were frozen in the stage.
    Return `None` if no layer has a known change.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    known = [(title, [unit for unit in moved if unit.relative_change is not None]) for title, moved in models]
    drawn = [(title, grid) for title, units in known if (grid := layer_map(units)).cells]
    if not drawn:
        return None
    grids = [grid for _, grid in drawn]
    cells = [units for grid in grids for units in grid.cells.values()]
    changes = sorted(_mean(unit.relative_change for unit in units) for units in cells)
    # The scale ends at the 99th percentile, so that one outlier does not make all other cells pale
    top = changes[min(len(changes) - 1, int(0.99 * len(changes)))]
    colours = ScalarMappable(Normalize(0.0, top or 1.0), colormaps[PALE_TO_DARK])
    beyond = "max" if changes[-1] > top else "neither"
    bar = {"label": "change from the base", "format": PercentFormatter(1, symbol=" %"), "extendfrac": 0.03}

    width = min(16.0, max(5.4, 2.4 + 0.3 * max(len(grid.columns) for grid in grids)))
    height = min(11.0, 2.4 + 0.19 * max(len(grid.layers) for grid in grids))
    across = max(1, min(len(grids), int(17 // width)))
    down = ceil(len(grids) / across)
    figure = Figure(figsize=(width * across, 0.9 + height * down), layout="constrained")
    parts = figure.subfigures(down, across, squeeze=False).ravel()
    for (title, grid), part in zip(drawn, parts, strict=False):
        part.suptitle(title, fontweight="bold")
        axes = part.subplots()
        _heat_map(axes, grid, colours)
        # The aspect gives the same width for any number of layers
        part.colorbar(colours, ax=axes, extend=beyond, pad=0.02, aspect=max(20, 6 * height), **bar)
    handles = [Patch(facecolor="white", edgecolor=EDGE, label="exactly as in the base")]
    if not all(any(unit.trainable for unit in units) for units in cells):
        handles.append(Patch(facecolor="white", edgecolor=EDGE, hatch=HATCH, label="frozen in this stage"))
    if any(len(grid.cells) < len(grid.columns) * len(grid.layers) for grid in grids):
        handles.append(Patch(facecolor=ABSENT, label="no such matrix"))
    abreast = len(handles) if width * across > 7 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=abreast, frameon=False)
    return figure


def _heat_map(axes: "Axes", grid: LayerMap[UnitChange], colours: "ScalarMappable") -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    rows = {layer: row for row, layer in enumerate(grid.layers)}
    places = {column: place for place, column in enumerate(grid.columns)}
    axes.set_facecolor(ABSENT)
    plain, hatched = [], []
    for (layer, column), units in grid.cells.items():
        moved = _mean(unit.relative_change for unit in units)
        corner = (places[column] - 0.5, rows[layer] - 0.5)
        cell = Rectangle(corner, 1, 1, facecolor=colours.to_rgba(moved) if moved else "white")
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
