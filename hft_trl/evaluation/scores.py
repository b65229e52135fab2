"""Hold the scores of an evaluation, and write them as tables, JSON, Markdown and a figure."""

from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path
from typing import Any

from rich.console import Console

from hft_trl import demo
from hft_trl.evaluation.suites import SUITES
from hft_trl.files import write_json, write_text, writing
from hft_trl.report import Report
from hft_trl.report.figures import save_figure
from hft_trl.report.plots import evaluation_figure
from hft_trl.report.tables import Grid, evaluation_grids, rich_table, table

AVERAGE = "average"
ERROR_OF_AVERAGE = (
    "The standard errors are the harness's, over the items of a task. That of an average is the root of the sum of "
    "its scores' squared errors, divided by their number: the tasks are fixed, and their items independent."
)


@dataclass(frozen=True)
class Score:
    """A score in percent. A model that diverged has no value."""

    value: float | None
    stderr: float | None = None  # of the value, where the harness gives one
    samples: int | None = None


@dataclass
class Evaluation:
    models: dict[str, str]  # digest by name, the base first
    scores: dict[str, dict[str, dict[str, Score]]]  # by suite, model and heading
    averaged: dict[str, list[str]]  # headings whose mean is the average, by suite
    skipped: list[str] = field(default_factory=list)  # headings that run code that a model wrote
    limit: int | None = None  # number of items of each task, by default all
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that the scores depend on
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def base(self) -> str:
        return next(iter(self.models))

    @property
    def meanings(self) -> dict[str, str]:
        return demo.MEANINGS if "demo" in self.scores else {}

    def average(self, suite: str, model: str) -> Score:
        """Return the mean score of a suite, with the standard error of independent scores."""
        scores = [self.scores[suite][model][heading] for heading in self.averaged[suite]]
        values, errors = [score.value for score in scores], [score.stderr for score in scores]
        if None in values:
            return Score(None)
        stderr = None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)
        return Score(sum(values) / len(values), stderr)

    def columns(self, suite: str, model: str) -> dict[str, Score]:
        """Return the scores of a model on a suite by heading, then their average."""
        return {**self.scores[suite][model], AVERAGE: self.average(suite, model)}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the base's name, with averages and differences (to the base) among the scores."""
        content = asdict(self)
        for suite, models in self.scores.items():
            base = self.columns(suite, self.base)
            for model in models:
                for heading, score in self.columns(suite, model).items():
                    both = model != self.base and None not in (score.value, base[heading].value)
                    difference = score.value - base[heading].value if both else None
                    content["scores"][suite][model][heading] = {**asdict(score), "difference": difference}
        return {"base": self.base, **content, "meanings": self.meanings}


def as_report(evaluation: Evaluation) -> Report:
    """Return the scores as a run's report has them, where averages are named after their suite."""
    report = Report([], {model: {} for model in evaluation.models}, {model: {} for model in evaluation.models})
    for suite, found in evaluation.scores.items():
        skipped = [name for task in SUITES[suite] for name in task.figures if name in evaluation.skipped]
        average = f"{suite} {AVERAGE}" + (f" without {', '.join(skipped)}" if skipped else "")
        report.suites[suite] = [*found[evaluation.base], average]
        for model in evaluation.models:
            for heading, score in zip(report.suites[suite], evaluation.columns(suite, model).values(), strict=True):
                report.evaluation[model][heading] = score.value
                report.standard_errors[model][heading] = score.stderr
    return report


def score_grids(evaluation: Evaluation) -> list[Grid]:
    """Return a table for each suite: a row for each model, a column for each score, then the average."""
    limit = "" if evaluation.limit is None else f", at most {evaluation.limit} of each task's items"
    return [
        replace(grid, title=f"{suite}{grid.title.removeprefix('Evaluation').removesuffix(')')}{limit})", note="")
        for suite, grid in zip(evaluation.scores, evaluation_grids(as_report(evaluation)), strict=True)
    ]


def _notes(evaluation: Evaluation) -> list[str]:
    meanings = "; ".join(f"{heading}: {meaning}" for heading, meaning in evaluation.meanings.items())
    names = ", ".join(evaluation.skipped)
    note = f"{names} was skipped and is not part of the average: it runs code that the model wrote."
    return [*([f"{meanings}."] if meanings else []), *([f"{note} Allow this with --run-code."] if names else [])]


def write_evaluation(evaluation: Evaluation, directory: str | Path) -> list[Path]:
    """Write `evaluation.json`, `.md` and `.png` to a folder, and return their paths."""
    folder = Path(directory)
    data, text, picture = (folder / f"evaluation.{ending}" for ending in ("json", "md", "png"))
    parts, figure = ["# Evaluation"], evaluation_figure(as_report(evaluation))
    for grid in score_grids(evaluation):
        parts += [f"## {grid.title}", table(grid)]
    parts += [*_notes(evaluation), ERROR_OF_AVERAGE]
    parts += [f"![scores]({picture.name})"] if figure is not None else []
    parts.append(f"Every figure comes from `{data.name}`, {evaluation.created}.")
    with writing(folder, resumes=False):
        write_json(data, evaluation.to_dict(), allow_nan=False)
        write_text(text, "\n\n".join(parts) + "\n")
        if figure is None:
            picture.unlink(missing_ok=True)  # of an earlier evaluation
            return [data, text]
        save_figure(figure, picture)
    return [data, text, picture]


def print_evaluation(evaluation: Evaluation) -> None:
    console = Console(highlight=False)
    for grid in score_grids(evaluation):
        console.print(rich_table(grid))
    for note in _notes(evaluation):
        console.print(note, markup=False)
