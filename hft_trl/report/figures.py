"""Define colors and helpers for all figures of the package."""

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from hft_trl.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which color-blind readers can distinguish
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#7F7F7F"
PALE_TO_DARK = "YlGnBu"  # matplotlib's name of the colors of a scale from little to much
STAGE_COLOURS = (GREY, BLUE, ORANGE, GREEN, PURPLE, SKY, RED)


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure atomically, in the format of the file's extension."""
    with replacing(path) as new:
        figure.savefig(new, dpi=150, facecolor="white")


def plain(text: str) -> str:
    """Escape a text so that matplotlib does not parse formulas in it."""
    return text.replace("$", r"\$")


def stage_colours(number: int) -> list[str]:
    """Return colors for a base model, which is gray, and the models trained from it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if number <= len(STAGE_COLOURS):
        return list(STAGE_COLOURS[:number])
    return [GREY, *(to_hex(colormaps["viridis"](place / (number - 2))) for place in range(number - 1))]


def panels(number: int) -> tuple["Figure", list["Axes"]]:
    """Return a figure with the given number of panels, at most three in a row."""
    from matplotlib.figure import Figure

    across = min(number, 3)
    down = ceil(number / across)
    figure = Figure(figsize=(max(6.0, 4.6 * across), 3.8 * down), layout="constrained")
    drawn = [figure.add_subplot(down, across, place + 1) for place in range(number)]
    for axes in drawn:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, drawn
