"""Write the frontier's results: `frontier.json`, `frontier.png` and `frontier.md`."""

import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from rich.console import Console

from hft_trl.experiments.frontier import AGAINST, KEPT, Frontier, model_name, read_frontier
from hft_trl.experiments.grid import BASE, FrontierArguments
from hft_trl.files import write_json, write_text
from hft_trl.redact import redact
from hft_trl.report import environment
from hft_trl.report.figures import panels, plain, save_figure, stage_colours
from hft_trl.report.tables import NONE, Grid, rich_table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {"": "o", "average": "^", "half-reset": "v"}
"""Markers of a model as trained, and of what is made from it without training."""


def write_frontier(output: Path, files: Sequence[Path], grid: FrontierArguments, argv: Sequence[str]) -> Frontier:
    """Write the three files of the frontier from the finished trials, and return the results."""
    found, versions = read_frontier(files, grid.kept), environment()
    content = {"points": found.points, "front": found.front, "recommendation": found.recommendation}
    write_json(output / "frontier.json", {**content, "command": redact(list(argv)), "environment": versions})
    save_figure(frontier_figure(found), output / "frontier.png")
    tables = "\n\n".join(f"{grid.title}\n\n{table(grid)}" for grid in grids(found))
    text = f"""# What is learned against what is kept

{found.recommendation}

![Learned against kept, by method](frontier.png)

{tables}

A model is on the front if no other has a task loss at most as high and keeps at least as much, in the means over the
seeds. The comparison at an equal task loss interpolates, seed by seed, between the learning rates of each method: the
best that it keeps at such a loss or a lower one. It takes the mean over the losses that both reach. p is from a
two-sided paired t-test over the seeds, not corrected for multiple comparisons.

Made by `python recipes/frontier.py {shlex.join(redact(list(argv)))}` on {datetime.now(UTC):%Y-%m-%d} with torch \
{versions["torch"]}, transformers {versions["transformers"]}, trl {versions["trl"]}.
"""
    write_text(output / "frontier.md", text)
    return found


def print_frontier(found: Frontier, output: Path) -> None:
    console = Console()
    for grid in grids(found):
        console.print(rich_table(grid))
    console.print(found.recommendation, markup=False)
    console.print(f"{output / 'frontier.md'} has all of it, with the figure frontier.png.", markup=False)


def grids(found: Frontier) -> list[Grid]:
    points = {model.name: [each for each in found.points if model_name(each) == model.name] for model in found.models}
    keys = {part: dict.fromkeys(key for point in found.points for key in point[part]) for part in ("learned", "kept")}

    def cells(model: str, part: str, names: Iterable[str]) -> list[str]:
        return [_value([point[part][each] for point in points[model]]) for each in names]

    rows = []
    for model in found.models:
        losses = cells(model.name, "learned", ["loss"]) + cells(model.name, "kept", keys["kept"])
        rows.append([model.name, str(model.seeds), *losses, "yes" if model.name in found.front else ""])
    headings = [kept.replace("_", " ") for kept in keys["kept"]]
    compared = [[name, *difference.cells(4)] for name, difference in found.differences.items()]
    tables = [Grid("Mean (standard deviation) over the seeds", ["", "seeds", "task loss", *headings, "front"], rows)]
    if tasks := [key for key in keys["learned"] if key not in ("loss", "mean_token_accuracy")]:
        rows = [[model.name, *cells(model.name, "learned", tasks)] for model in found.models]
        tables.append(Grid("Scores of lm-evaluation-harness, mean (standard deviation)", ["", *tasks], rows))
    if compared:
        title = f"Difference to {AGAINST} at an equal task loss: {KEPT[found.kept]}"
        tables.append(Grid(title, ["", "mean", "95 % interval", "p", "seeds that keep more"], compared))
    return tables


def frontier_figure(found: Frontier) -> "Figure":
    """
    Draw the task loss against what is kept: a color per method, a marker per treatment.

    The base is a horizontal line: its task loss is often so far from the others that a point would squeeze them.
    """
    figure, (axes,) = panels(1)
    figure.set_size_inches(8, 5.5)
    trained = [model for model in found.models if model.method != BASE]
    methods = list(dict.fromkeys(model.method for model in trained))
    colours = dict(zip([BASE, *methods], stage_colours(len(methods) + 1), strict=True))
    for base in (model for model in found.models if model.method == BASE):
        axes.axhline(base.kept, color=colours[BASE], linestyle="--", linewidth=1.2, label=BASE)
    drawn = dict.fromkeys((model.method, model.treatment) for model in trained)
    for method, treatment in sorted(drawn, key=lambda curve: methods.index(curve[0])):
        models = [model for model in trained if (model.method, model.treatment) == (method, treatment)]
        fields = ("learned", "kept", "kept_spread", "learned_spread")
        places = [[vars(model)[field] for model in models] for field in fields]
        line = {"linestyle": "none" if treatment else "-", "linewidth": 1.2, "elinewidth": 0.8, "markersize": 5}
        label = plain(models[0].series)
        axes.errorbar(*places, marker=MARKERS[treatment], color=colours[method], label=label, **line)
    places = [[vars(model)[field] for model in trained if model.name in found.front] for field in ("learned", "kept")]
    ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black"}
    axes.plot(*places, "o", label="on the front", **ring)
    axes.invert_xaxis()  # learned more: to the right
    if found.kept != "facts":
        axes.invert_yaxis()  # kept more: upwards
    axes.set_xlabel("task loss on the evaluation split (learned more to the right)")
    axes.set_ylabel(f"{KEPT[found.kept]}, kept more upwards")
    if found.models:
        axes.legend(frameon=False, fontsize=9)
    return figure


def _value(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return NONE
    spread = stdev(found) if len(found) > 1 else 0
    return f"{fmean(found):.3f}" + (f" ({spread:.3f})" if spread else "")
