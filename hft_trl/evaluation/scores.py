"""The scores of an evaluation: the content of `evaluation.json`."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import sqrt
from typing import Any

from hft_trl import demo

AVERAGE = "average"


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
        """Return the name of the first model, with which the others are compared."""
        return next(iter(self.models))

    @property
    def meanings(self) -> dict[str, str]:
        """Return what the embedded world's scores are, by heading."""
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

    def difference(self, suite: str, model: str, heading: str) -> float | None:
        """Return a score minus the base's in percentage points, `None` for the base or without a value."""
        own, other = (self.columns(suite, name)[heading].value for name in (model, self.base))
        return None if model == self.base or own is None or other is None else own - other

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the base's name, with averages and differences among the scores."""
        content = asdict(self)
        content["scores"] = {
            suite: {
                model: {
                    heading: {**asdict(score), "difference": self.difference(suite, model, heading)}
                    for heading, score in self.columns(suite, model).items()
                }
                for model in models
            }
            for suite, models in self.scores.items()
        }
        return {"base": self.base, **content, "meanings": self.meanings}
