"""Output of an evaluation: tables on the terminal, and `evaluation.json`, `.md` and `.png`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hft_trl.evaluation.scores import Evaluation, Score
from hft_trl.files import write_json, write_text, writing
from hft_trl.report.figures import plain, save_figure, stage_colours
from hft_trl.report.tables import NONE, Grid, rich_table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERROR_OF_AVERAGE = (
    "The standard errors are the harness's, over the items of a task. That of an average is the root of the sum of "
    "its scores' squared errors, divided by their number: the tasks are fixed, and their items independent."
)


def score_grids(evaluation: Evaluation) -> list[Grid]:
    """Return a table for each suite: a row for each model, a column for each score, then the average."""
    base = evaluation.base
    against = f", in brackets the difference to {base}" if len(evaluation.models) > 1 else ""
    limit = "" if evaluation.limit is None else f", at most {evaluation.limit} of each task's items"
    grids = []
    for suite in evaluation.scores:
        rows = []
        for model in evaluation.models:
            scores = evaluation.columns(suite, model).items()
            cells = [_cell(score, evaluation.difference(suite, model, heading)) for heading, score in scores]
            rows.append([model, *cells])
        columns = ["model", *(heading.replace("_", " ") for heading in evaluation.columns(suite, base))]
        grids.append(Grid(f"{suite} (percent ± standard error{against}{limit})", columns, rows))
    return grids


def _cell(score: Score, difference: float | None) -> str:
    if score.value is None:
        return NONE
    error = "" if score.stderr is None else f"±{score.stderr:.1f}"
    against = "" if difference is None else f" ({difference:+.1f})"
    return f"{score.value:.1f}{error}{against}"


def _notes(evaluation: Evaluation) -> list[str]:
    meanings = "; ".join(f"{heading}: {meaning}" for heading, meaning in evaluation.meanings.items())
    names = ", ".join(evaluation.skipped)
    note = f"{names} was skipped and is not part of the average: it runs code that the model wrote."
    return [*([f"{meanings}."] if meanings else []), *([f"{note} Allow this with --run-code."] if names else [])]


def write_evaluation(evaluation: Evaluation, directory: str | Path) -> list[Path]:
    """Write `evaluation.json`, `.md` and `.png` to a folder, and return their paths."""
    folder = Path(directory)
    data, text, picture = (folder / f"evaluation.{ending}" for ending in ("json", "md", "png"))
    parts = ["# Evaluation"]
    for grid in score_grids(evaluation):
        parts += [f"## {grid.title}", table(grid)]
    parts += [*_notes(evaluation), ERROR_OF_AVERAGE]
    parts += [f"![scores]({picture.name})", f"Every figure comes from `{data.name}`, {evaluation.created}."]
    with writing(folder, resumes=False):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(data, evaluation.to_dict(), allow_nan=False)
        write_text(text, "\n\n".join(parts) + "\n")
        save_figure(score_figure(evaluation), picture)
    return [data, text, picture]


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the tables of an evaluation on standard output."""
    console = Console(highlight=False)
    for grid in score_grids(evaluation):
        console.print(rich_table(grid))
    for note in _notes(evaluation):
        console.print(note, markup=False)


def score_figure(evaluation: Evaluation) -> "Figure":
    """Draw scores as bars with standard errors and differences to the base, a panel for each suite."""
    from matplotlib.figure import Figure  # does not change the state of pyplot

    models, suites = list(evaluation.models), list(evaluation.scores)
    headings = {suite: list(evaluation.columns(suite, evaluation.base)) for suite in suites}
    widest = max(map(len, headings.values()))
    size = (min(20, max(6.0, 1.6 + widest * max(1.1, 0.4 * len(models)))), 3.9 * len(suites))
    figure = Figure(figsize=size, layout="constrained")
    pitch = 0.8 / len(models)
    for number, (suite, columns) in enumerate(headings.items(), 1):
        axes = figure.add_subplot(len(suites), 1, number, title=suite, ylabel="percent")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        for place, (model, colour) in enumerate(zip(models, stage_colours(len(models)), strict=True)):
            scores = evaluation.columns(suite, model).values()
            bars = axes.bar(
                [column - 0.4 + pitch * (place + 0.5) for column in range(len(columns))],
                [float("nan") if score.value is None else score.value for score in scores],
                0.92 * pitch,
                yerr=[score.stderr or 0 for score in scores],
                error_kw={"linewidth": 0.9, "capsize": 2},
                color=colour,
            )
            differences = [evaluation.difference(suite, model, heading) for heading in columns]
            labels = ["" if difference is None else f"{difference:+.1f}" for difference in differences]
            axes.bar_label(bars, labels, rotation=90, padding=3, fontsize=7)
        axes.set_xticks(range(len(columns)), [heading.replace("_", "\n") for heading in columns])
        axes.set(ylim=(0, 115), yticks=range(0, 101, 20))  # room for the label of a full bar
    # The axes' own legend omits names that begin with an underscore
    bars, names = figure.axes[0].containers[1::2], [plain(model) for model in models]
    figure.legend(bars, names, loc="outside lower center", ncols=2, frameon=False)
    return figure
