"""The bar chart of an evaluation. Drawn on a figure of its own, so that no plotting state of the user's is touched."""

from typing import TYPE_CHECKING

from hft_trl.evaluation.scores import Evaluation
from hft_trl.report.figures import plain, stage_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_figure(evaluation: Evaluation) -> "Figure":
    """
    Draw the scores as bars with their standard errors, and above them their differences to the base, a panel a suite.

    Args:
        evaluation ([`Evaluation`]):
            The evaluation.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    from matplotlib.figure import Figure

    models, suites = list(evaluation.models), list(evaluation.scores)
    headings = {suite: list(evaluation.columns(suite, models[0])) for suite in suites}
    widest = max(map(len, headings.values()))
    size = (min(20, max(6.0, 1.6 + widest * max(1.1, 0.4 * len(models)))), 3.9 * len(suites))
    figure = Figure(figsize=size, layout="constrained")
    colours = stage_colours(len(models))
    pitch = 0.8 / len(models)
    for number, suite in enumerate(suites):
        axes = figure.add_subplot(len(suites), 1, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        for place, model in enumerate(models):
            scores = evaluation.columns(suite, model).values()
            bars = axes.bar(
                [column - 0.4 + pitch * (place + 0.5) for column in range(len(headings[suite]))],
                [float("nan") if score.value is None else score.value for score in scores],
                0.92 * pitch,
                yerr=[score.stderr or 0 for score in scores],
                error_kw={"linewidth": 0.9, "capsize": 2},
                color=colours[place],
            )
            differences = [evaluation.difference(suite, model, heading) for heading in headings[suite]]
            labels = ["" if difference is None else f"{difference:+.1f}" for difference in differences]
            axes.bar_label(bars, labels, rotation=90, padding=3, fontsize=7)
        axes.set_xticks(range(len(headings[suite])), [heading.replace("_", "\n") for heading in headings[suite]])
        axes.set_ylim(0, 115)  # room for the label of a full bar
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("percent")
        axes.set_title(suite)
    # Names are given here, since a name that begins with a line would be left out of the axes' own legend
    figure.legend(
        figure.axes[0].containers[1::2],
        [plain(model) for model in models],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure
