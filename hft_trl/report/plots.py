"""Draw the plots of a report on own figures, without changing matplotlib's state."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from hft_trl.report.figures import BLUE, RED, panels, plain, stage_colours
from hft_trl.report.movement import movement_figure
from hft_trl.report.record import HISTORY, MARGIN, Report, StageRecord
from hft_trl.report.tables import MEASURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(report: Report) -> "Figure | None":
    """Draw the loss over the steps, a panel for each stage."""
    return _curves(report, "loss", "loss", "training loss", RED, "evaluation loss")


def margin_figure(report: Report) -> "Figure | None":
    """Draw the reward margin over the steps, a panel for each stage that has one."""
    return _curves(report, MARGIN, "reward", "margin", BLUE, "margin in evaluation")


def _curves(report: Report, key: str, unit: str, label: str, colour: str, evaluated: str) -> "Figure | None":
    """Draw a logged value over the steps, and its evaluations in `colour`."""
    stages = [stage for stage in report.stages if _series(stage, key)[0]]
    if not stages:
        return None
    figure, drawn = panels(len(stages))
    for stage, axes in zip(stages, drawn, strict=True):
        if key == MARGIN:
            axes.axhline(0, color="black", linewidth=0.8)
        steps, values = _series(stage, key)
        axes.plot(steps, values, "o-" if len(values) < 25 else "-", color=BLUE, markersize=4, label=label)
        steps, values = _series(stage, f"eval_{key}")
        if steps:
            axes.plot(steps, values, "D", color=colour, markersize=5, label=evaluated)
        axes.set_title(f"{stage.name} ({stage.method.upper()})")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.legend(frameon=False)
    return figure


def retention_figure(report: Report) -> "Figure | None":
    """Draw what the model keeps over the steps of all stages, a panel for each measure."""
    history: dict[str, list[dict]] = report.retention.get(HISTORY, {})
    known = {name for rows in history.values() for row in rows for name in row if row[name] is not None}
    measures = [name for name in MEASURES if name in known]
    if not measures:
        return None
    figure, drawn = panels(len(measures))
    _, *colours = stage_colours(len(history) + 1)
    for name, axes in zip(measures, drawn, strict=True):
        begin = 0
        for (stage, rows), colour in zip(history.items(), colours, strict=True):
            points = [(begin + row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=stage)
            begin += max(row["step"] for row in rows)
        axes.set_xlabel("step of all stages")
        axes.set_ylabel(MEASURES[name])
        axes.legend(frameon=False)
    return figure


def evaluation_figure(report: Report) -> "Figure | None":
    """Draw the scores of all models: those of the suites, without suites all."""
    from matplotlib.figure import Figure

    known = {name for scores in report.evaluation.values() for name, value in scores.items() if value is not None}
    every = list(report.suites.values()) or list(report.evaluation.values())
    measures = list(dict.fromkeys(name for names in every for name in names if name in known))
    if not measures:
        return None
    models = list(report.evaluation)
    methods = {stage.name: stage.method.upper() for stage in report.stages}
    pitch = 0.8 / len(models)
    colours = stage_colours(len(models))
    figure = Figure(figsize=(min(16, max(6.0, 1.6 + 0.62 * len(models) * len(measures))), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, model in enumerate(models):
        scores, errors = report.evaluation[model], report.standard_errors.get(model, {})
        drawn = [(place, name) for place, name in enumerate(measures) if scores.get(name) is not None]
        shown = f"{model} ({methods[model]})" if model in methods else model
        bars = axes.bar(
            [place - 0.4 + pitch * (number + 0.5) for place, _ in drawn],
            [scores[name] for _, name in drawn],
            0.92 * pitch,
            yerr=[errors.get(name) or 0 for _, name in drawn] if errors else None,
            error_kw={"linewidth": 0.9, "capsize": 2},
            color=colours[number],
            label=f" {plain(shown)}" if shown.startswith("_") else plain(shown),  # a legend omits names such as _a
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9 if len(models) * len(measures) <= 16 else 6)
    axes.set_xticks(range(len(measures)), [name.replace("_", " ") for name in measures])
    if len(measures) > 4:
        axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlim(-0.6, len(measures) - 0.4)
    axes.set_ylabel("score (percent)")
    top = axes.get_ylim()[1]  # with errors
    axes.set_ylim(0, 108 if top > 50 else max(1.0, 1.1 * top))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=min(len(models), 4), loc="outside upper center")
    return figure


def _series(stage: StageRecord, key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in stage.history if row.get(key) is not None and row.get("step") is not None]
    return [row["step"] for row in rows], [row[key] for row in rows]


FIGURES: dict[str, Callable[[Report], "Figure | None"]] = {
    "evaluation.png": evaluation_figure,
    "loss.png": loss_figure,
    "margins.png": margin_figure,
    "moved.png": movement_figure,
    "retention.png": retention_figure,
}
