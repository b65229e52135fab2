"""What an evaluation measured: the content of `evaluation.json`."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import sqrt
from typing import Any

AVERAGE = "average"


@dataclass(frozen=True)
class Score:
    """
    A figure in percent.

    Args:
        value (`float`, *optional*):
            From 0 to 100, `None` where the model gives no number (one that diverged).
        stderr (`float`, *optional*):
            Its standard error, `None` where the harness has none.
        samples (`int`, *optional*):
            Number of items that it was measured on.
    """

    value: float | None
    stderr: float | None = None
    samples: int | None = None


@dataclass
class Evaluation:
    """
    Models, and their scores on suites.

    Args:
        models (`dict[str, str]`):
            Digest of each model by name, the base first.
        scores (`dict[str, dict[str, dict[str, Score]]]`):
            Scores by suite, model and heading.
        averaged (`dict[str, list[str]]`):
            Headings whose mean is a suite's average.
        skipped (`list[str]`, *optional*):
            Headings that were left out because they run code that a model wrote.
        limit (`int`, *optional*):
            Number of items of each task, where not all.
        versions (`dict[str, str]`, *optional*):
            Versions of what was measured with.
        created (`str`, *optional*):
            Time of creation (ISO 8601, UTC), defaults to now.
    """

    models: dict[str, str]
    scores: dict[str, dict[str, dict[str, Score]]]
    averaged: dict[str, list[str]]
    skipped: list[str] = field(default_factory=list)
    limit: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def average(self, suite: str, model: str) -> Score:
        """
        The mean of a suite's averaged scores.

        Args:
            suite (`str`):
                Name of the suite.
            model (`str`):
                Name of the model.

        Returns:
            [`Score`]: The mean, with the standard error that it has where the scores' errors are independent.
        """
        scores = [self.scores[suite][model][heading] for heading in self.averaged[suite]]
        errors = [score.stderr for score in scores]
        stderr = None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)
        values = [score.value for score in scores]
        return Score(None, None) if None in values else Score(sum(values) / len(values), stderr)

    @property
    def base(self) -> str:
        """Name of the first model, to which the others are compared."""
        return next(iter(self.models))

    def difference(self, suite: str, model: str, heading: str) -> float | None:
        """What a model's score is above the base's, in percentage points; `None` for the base, or without a number."""
        own, other = (self.columns(suite, name)[heading].value for name in (model, self.base))
        return None if model == self.base or own is None or other is None else own - other

    def columns(self, suite: str, model: str) -> dict[str, Score]:
        """The scores of a model on a suite by heading, and their average."""
        return {**self.scores[suite][model], AVERAGE: self.average(suite, model)}

    def to_dict(self) -> dict[str, Any]:
        """
        The content of `evaluation.json`: the fields and the name of the base; among the scores the averages, and with each score
        its difference to the base's.
        """
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
        return {"base": self.base, **content}
