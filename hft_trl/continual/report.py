"""Write the report of a run's scores, and the comparison of several runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hft_trl.continual.rounds import WITHOUT_TRANSFER
from hft_trl.continual.run_folder import SCORES_FILE, Scores, read_scores
from hft_trl.errors import HFTError
from hft_trl.files import resolved, write_text, writing
from hft_trl.report.figures import PALE_TO_DARK, STAGE_COLOURS, panels, plain, save_figure
from hft_trl.report.tables import NONE, Grid, meaning, retention_grid, rich_table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(folder: str | Path) -> Path:
    """Write `report.md`, `matrix.png` and `curves.png` of a run, and return the path of the report."""
    folder, scores = Path(folder), read_scores(folder)
    with writing(folder):
        save_figure(matrix_figure(scores), folder / "matrix.png")
        save_figure(curves_figure({run_name(scores): scores}), folder / "curves.png")
        write_text(folder / "report.md", _markdown(scores))
    return folder / "report.md"


def _markdown(scores: Scores) -> str:
    probes = []
    for model, found in scores["probes"].items():
        values = [f"{name.replace('_', ' ')} {NONE if v is None else f'{v:.1f}'}" for name, v in found.items()]
        probes.append(f"- {model}: {', '.join(values)}")
    meanings = {text for found in scores["probes"].values() if (text := meaning(found))}
    kept = ["## Retention (in brackets the difference to base)", table(retention_grid(scores["retention"]))]
    parts = [
        "# Continual learning report",
        f"{run_name(scores)}, from `{scores['model']}`. Every figure comes from `{SCORES_FILE}`.",
        f"OP {scores['op'][-1]:.1f}, BWT {transfer(scores)} after the last of {len(scores['rounds'])} rounds.",
        "## Scores",
        table(score_grid(scores)),
        "![Score on each task after each round](matrix.png)",
        "OP is the mean of a row. BWT is the sum of the changes of earlier tasks since their own round (negative if "
        "forgotten), divided by the number of tasks seen. `constant` is the score of always giving a task's most "
        "frequent training answer: a model that scores no more may have learned nothing else.",
        "![Overall performance and backward transfer](curves.png)",
        "## Forgetting",
        table(forgetting_grid(scores)),
        *(kept if scores["retention"] else []),
        *(["## General abilities and knowledge", *meanings, "\n".join(probes)] if probes else []),
        f"At the end {sum(scores['empty_predictions'][-1])} predictions were empty (they score 0), and "
        f"{sum(scores['truncated_prompts'][-1])} prompts were truncated from the left.",
    ]
    return "\n\n".join(parts) + "\n"


def print_scores(folder: str | Path) -> None:
    Console().print(rich_table(score_grid(read_scores(folder))))


def compare(folders: Iterable[str | Path]) -> dict[str, Scores]:
    """Read the scores of finished runs by folder. Reject runs that cannot be compared."""
    runs: dict[str, Scores] = {}
    for name in map(str, folders):
        if resolved(name) in map(resolved, runs):
            raise HFTError(f"{name} is given twice: name each run once.")
        scores = runs[name] = read_scores(name)
        first, other = next(iter(runs.items()))
        if len(scores["matrix"][-1]) < len(scores["tasks"]):
            raise HFTError(
                f"{name} has {len(scores['matrix'])} rounds of {len(scores['tasks'])} tasks: finish it first."
            )
        for key in ("tasks", "metrics", "model"):
            if scores[key] != other[key]:
                ours, theirs = (run[key] if key == "model" else ", ".join(run[key]) for run in (scores, other))
                raise HFTError(f"{name} has the {key} {ours}, {first} has {theirs}: compare runs with the same {key}.")
        if scores["settings"].get("test_sets") != other["settings"].get("test_sets"):
            raise HFTError(f"{name} has other test sets than {first}: compare runs of one benchmark.")
    return runs


def write_comparison(runs: Mapping[str, Scores], folder: str | Path) -> Path:
    """Write `comparison.md` and `comparison.png` of runs, and return the path of the first."""
    folder = Path(folder)
    with writing(folder):
        labels = {f"{run_name(run)} ({name})": run for name, run in runs.items()}
        save_figure(curves_figure(labels), folder / "comparison.png")
        parts = ["# Comparison of continual runs", table(comparison_grid(runs)), "![OP and BWT](comparison.png)"]
        if differences := other_settings(runs):
            parts += ["These runs differ in other settings too:", "\n".join(f"- {line}" for line in differences)]
        write_text(folder / "comparison.md", "\n\n".join(parts) + "\n")
    return folder / "comparison.md"


def run_name(scores: Scores) -> str:
    """Name a run by approach and method, such as `sequential, HFT`. Adapters have no method."""
    return scores["approach"] + (f", {scores['method'].upper()}" if scores["method"] else "")


def transfer(scores: Scores, number: int = -1) -> str:
    return NONE if scores["approach"] in WITHOUT_TRANSFER else f"{scores['bwt'][number]:+.1f}"


def score_grid(scores: Scores) -> Grid:
    """Show the matrix with OP, BWT and constant answers: a row per round, a column per task."""
    rows = [["constant", *(f"{score:.1f}" for score in scores["constant_answer"]), NONE, NONE]]
    for number, (planned, row) in enumerate(zip(scores["rounds"], scores["matrix"], strict=True)):
        cells = [f"{score:.1f}" for score in row] + [NONE] * (len(scores["tasks"]) - len(row))
        rows.append([planned["name"], *cells, f"{scores['op'][number]:.1f}", transfer(scores, number)])
    return Grid(f"{run_name(scores)}: scores from 0 to 100", ["after", *scores["tasks"], "OP", "BWT"], rows)


def forgetting_grid(scores: Scores) -> Grid:
    """Show each task's score after its own round, at the end, and the change."""
    rows = []
    for number, last in enumerate(scores["matrix"][-1]):
        own = next(row for row in scores["matrix"] if len(row) > number)[number]
        name, metric = scores["tasks"][number], scores["metrics"][number]
        rows.append([name, metric, f"{own:.1f}", f"{last:.1f}", f"{last - own:+.1f}"])
    return Grid("Forgetting", ["task", "metric", "after its round", "at the end", "change"], rows)


def comparison_grid(runs: Mapping[str, Scores]) -> Grid:
    rows = [
        [name, run["approach"], (run["method"] or NONE).upper(), f"{run['op'][-1]:.1f}", transfer(run)]
        for name, run in runs.items()
    ]
    return Grid("After the last round", ["run", "approach", "method", "OP", "BWT"], rows)


def other_settings(runs: Mapping[str, Scores]) -> list[str]:
    """List the settings besides approach and method that differ between runs, a line for each."""
    lines = []
    for key in dict.fromkeys(key for scores in runs.values() for key in scores["settings"]):
        found = {name: scores["settings"][key] for name, scores in runs.items() if key in scores["settings"]}
        if len(set(map(str, found.values()))) > 1:
            lines.append(f"{key}: " + ", ".join(f"{value} ({name})" for name, value in found.items()))
    return lines


def matrix_figure(scores: Scores) -> "Figure":
    """Draw the score on each task after each round as a heat map. Tasks not seen by then are gray."""
    from matplotlib.figure import Figure

    tasks, matrix = scores["tasks"], scores["matrix"]
    figure = Figure(figsize=(1.8 + 0.72 * len(tasks), 1.6 + 0.45 * len(matrix)), layout="constrained")
    axes = figure.add_subplot(facecolor="#DDDDDD", xlabel="score on", ylabel="after", title=run_name(scores))
    text = {"ha": "center", "va": "center", "fontsize": 8}
    for number, row in enumerate(matrix):
        for task, score in enumerate(row):
            axes.text(task, number, f"{score:.0f}", color="black" if score < 60 else "white", **text)
    cells = [row + [float("nan")] * (len(tasks) - len(row)) for row in matrix]
    image = axes.imshow(cells, cmap=PALE_TO_DARK, vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", parse_math=False)
    axes.set_yticks(range(len(matrix)), [planned["name"] for planned in scores["rounds"]])
    figure.colorbar(image, label="score (0 to 100)")
    return figure


def curves_figure(runs: Mapping[str, Scores]) -> "Figure":
    """Draw OP and BWT over the rounds, a line for each run. The keys are names for the legend."""
    figure, drawn = panels(2)
    for axes, key, label in zip(
        drawn, ("op", "bwt"), ("overall performance, OP", "backward transfer, BWT"), strict=True
    ):
        axes.axhline(0, color="#999999", linewidth=0.8)
        for number, (name, scores) in enumerate(runs.items()):
            shown = {"color": STAGE_COLOURS[(number + 1) % len(STAGE_COLOURS)], "label": plain(name)}
            style = ("-", "--", ":")[number // len(STAGE_COLOURS) % 3]
            if len(scores[key]) == 1:  # a single round of all tasks is a level to compare with
                axes.axhline(scores[key][0], linestyle="--", **shown)
            else:
                axes.plot(range(1, len(scores[key]) + 1), scores[key], style, marker="o", markersize=3.5, **shown)
        axes.set(xlabel="round", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
