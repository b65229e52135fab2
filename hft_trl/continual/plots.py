"""Pictures of continual runs: the matrix of scores as a heat map, overall performance and backward transfer as curves."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hft_trl.continual.tables import Scores, run_name
from hft_trl.report.figures import STAGE_COLOURS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def matrix_figure(scores: Scores) -> "Figure":
    """
    Draw the score on each task after each round; tasks not seen by then stay grey.

    Args:
        scores (`Scores`):
            A run's scores.
    """
    import numpy as np
    from matplotlib.figure import Figure

    tasks, matrix = scores["tasks"], scores["matrix"]
    cells = np.full((len(matrix), len(tasks)), np.nan)
    for number, row in enumerate(matrix):
        cells[number, : len(row)] = row
    figure = Figure(figsize=(1.8 + 0.72 * len(tasks), 1.6 + 0.45 * len(matrix)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(cells, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for number, row in enumerate(matrix):
        for task, score in enumerate(row):
            axes.text(
                task,
                number,
                f"{score:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if score < 60 else "black",
            )
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", parse_math=False)
    axes.set_yticks(range(len(matrix)), [planned["name"] for planned in scores["rounds"]])
    axes.set_xlabel("score on")
    axes.set_ylabel("after")
    figure.colorbar(image, label="score (0 to 100)")
    axes.set_title(run_name(scores))
    return figure


def curves_figure(runs: Mapping[str, Scores]) -> "Figure":
    """
    Draw overall performance and backward transfer over the rounds, a line for each run.

    Args:
        runs (`Mapping[str, Scores]`):
            Scores by the name in the legend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for place, (key, label) in enumerate((("op", "overall performance, OP"), ("bwt", "backward transfer, BWT")), 1):
        axes = figure.add_subplot(1, 2, place)
        _lines(axes, {name: scores[key] for name, scores in runs.items()})
        axes.set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _lines(axes: "Axes", values: Mapping[str, list[float]]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.axhline(0, color="#999999", linewidth=0.8)
    for number, (name, line) in enumerate(values.items()):
        colour = STAGE_COLOURS[(number + 1) % len(STAGE_COLOURS)]
        style = ("-", "--", ":")[number // len(STAGE_COLOURS) % 3]
        # A run of one round, all tasks pooled, is a level to compare with.
        if len(line) == 1:
            axes.axhline(line[0], color=colour, linestyle="--", label=plain(name))
        else:
            axes.plot(
                range(1, len(line) + 1),
                line,
                style,
                marker="o",
                markersize=3.5,
                color=colour,
                label=plain(name),
            )
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
