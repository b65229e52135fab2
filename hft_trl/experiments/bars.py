"""A figure for each question, with a point for every seed, means and standard deviations."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from hft_trl.experiments.paired_tests import of_common_seeds
from hft_trl.experiments.questions import BASE, Question
from hft_trl.experiments.trials import Scores
from hft_trl.report.figures import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_figures(questions: Iterable[Question], scores: Scores, output_dir: str | Path) -> list[Path]:
    """Draw a figure for each question that has scores, and return the files."""
    written = []
    for question in questions:
        figure = question_figure(question, scores)
        if figure is not None:
            written.append(Path(output_dir) / f"{question.name}.png")
            figure.savefig(written[-1], dpi=130, facecolor="white")
    return written


def question_figure(question: Question, scores: Scores) -> "Figure | None":
    """Draw a panel for each score with a bar for each run, `None` without any score."""
    from matplotlib.figure import Figure

    scores = of_common_seeds(question, scores)
    runs = {label: run for label, run in question.runs.items() if scores.get(run)}
    if not runs:
        return None
    wide = max(4.0, 0.75 * len(runs) + 1.2)
    figure = Figure(figsize=(wide * len(question.scores), 4.2), layout="constrained")
    for number, score in enumerate(question.scores):
        axes = figure.add_subplot(1, len(question.scores), number + 1)
        _panel(axes, runs, question.against, scores, score)
    figure.suptitle(question.title, fontsize=12)
    return figure


def draw_bars(axes: "Axes", bars: Iterable[tuple[Sequence[float], str]], spread: float) -> None:
    """Draw a bar for each list of values and colour: mean, standard deviation, and a point per value."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    for place, (values, colour) in enumerate(bars):
        if not values:
            continue
        places = [place + (step - (len(values) - 1) / 2) / len(values) * spread for step in range(len(values))]
        axes.bar(place, fmean(values), 0.7, color=colour, alpha=0.35)
        axes.plot(places, values, "o", color=colour, markersize=3.5)
        if len(values) > 1:
            axes.errorbar(place, fmean(values), stdev(values), color="black", capsize=4, linewidth=1.2)


def _panel(axes: "Axes", runs: dict[str, str], against: str, scores: Scores, score: str) -> None:
    colours = {BASE: GREY, against: ORANGE}
    draw_bars(
        axes,
        [([s[score] for s in scores[run].values()], colours.get(label, BLUE)) for label, run in runs.items()],
        spread=0.4,
    )
    long = max(len(label) for label in runs) * len(runs) > 40
    axes.set_xticks(
        range(len(runs)), list(runs), rotation=35 if long else 0, ha="right" if long else "center", fontsize=9
    )
    axes.set_ylabel(f"{score.replace('_', ' ')} (percent)")
    axes.set_ylim(0, 104)
