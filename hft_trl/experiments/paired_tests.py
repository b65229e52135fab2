"""Tables of scores over many seeds: means, standard deviations, and paired tests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev

from hft_trl.errors import HFTError
from hft_trl.experiments.questions import BASE, Question
from hft_trl.experiments.trials import Scores
from hft_trl.report.tables import Grid, table

NONE = "-"


@dataclass(frozen=True)
class Difference:
    """
    Difference of a score between two runs, over their common seeds.

    `low` and `high` bound the mean's 95 % confidence interval, `p` is of the two-sided paired t-test; undefined values
    are `nan`. `ahead` is the number of seeds in which the first run was better.
    """

    seeds: int
    mean: float
    low: float
    high: float
    p: float
    ahead: int


def check_tests() -> None:
    """Reject a missing scipy before hours of training."""
    if find_spec("scipy") is None:
        raise HFTError(
            "the paired tests need scipy, which is not installed: pip install -c constraints.txt -e '.[eval]'."
        )


def compare(scores: Scores, run: str, against: str, score: str) -> Difference | None:
    """Compare a score of two runs seed by seed, `None` without common seeds."""
    ours, theirs = scores.get(run, {}), scores.get(against, {})
    seeds = sorted(ours.keys() & theirs.keys())
    return paired([ours[seed][score] - theirs[seed][score] for seed in seeds]) if seeds else None


def paired(differences: Sequence[float], better: int = 1) -> Difference:
    """Test the differences of pairs against 0. With `better=-1` a lower value is ahead."""
    from scipy.stats import ttest_1samp

    ahead, nan = sum(difference * better > 0 for difference in differences), float("nan")
    if len(set(differences)) == 1:  # no spread to test against
        low = high = differences[0] if len(differences) > 1 else nan
        return Difference(len(differences), differences[0], low, high, nan, ahead)
    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    return Difference(len(differences), fmean(differences), interval.low, interval.high, test.pvalue, ahead)


def of_common_seeds(question: Question, scores: Scores) -> Scores:
    """Return scores of a question's runs for their common seeds. The base has only one seed."""
    found = {run: scores[run] for run in question.runs.values() if run in scores}
    tuned = [set(values) for run, values in found.items() if run != BASE]
    seeds = set.intersection(*tuned) if tuned else set()
    return {
        run: values if run == BASE else {seed: values[seed] for seed in values if seed in seeds}
        for run, values in found.items()
    }


def tables(question: Question, scores: Scores) -> list[Grid]:
    """Return two tables: means with standard deviations, and differences to `question.against`."""
    scores = of_common_seeds(question, scores)
    names = [score.replace("_", " ") for score in question.scores]
    means, differences = [], []
    for label, run in question.runs.items():
        seeds = scores.get(run, {})
        cells = [mean_cell([found[score] for found in seeds.values()]) for score in question.scores]
        means.append([label, str(len(seeds) or NONE), *cells])
        if label in (question.against, BASE):
            continue
        for score in question.scores:
            found = compare(scores, run, question.runs[question.against], score)
            if found is not None:
                differences.append([label, score.replace("_", " "), *difference_cells(found)])
    against = f"difference to {question.against}"
    return [
        Grid(question.title, ["", "seeds", *names], means),
        Grid(against, ["", "score", "mean", "95 % interval", "p", "ahead"], differences),
    ]


def markdown(questions: Iterable[Question], scores: Scores) -> str:
    """Return all answers as Markdown, with the figures of [`write_figures`]."""
    parts = []
    for question in questions:
        means, differences = tables(question, scores)
        parts += [f"## {question.title}", table(means)]
        if differences.rows:
            parts += [f"Less the scores of {question.against}, seed by seed:", table(differences)]
        parts.append(f"![{question.title}]({question.name}.png)")
    return "\n\n".join(parts) + "\n"


def write_results(questions: Iterable[Question], scores: Scores, output_dir: str | Path, head: str) -> Path:
    """Write `results.md` below the given heading, and return its path."""
    path = Path(output_dir) / "results.md"
    path.write_text(f"{head.rstrip()}\n\n{markdown(questions, scores)}", encoding="utf-8")
    return path


def mean_cell(values: Sequence[float]) -> str:
    """Return mean and standard deviation over the seeds, for a table."""
    if not values:
        return NONE
    return f"{fmean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else "")


def difference_cells(found: Difference) -> list[str]:
    """Return mean, interval, p-value and seeds ahead, for a table."""
    interval = NONE if found.low != found.low else f"{found.low:+.1f} to {found.high:+.1f}"
    return [f"{found.mean:+.1f}", interval, p_value(found.p), f"{found.ahead} of {found.seeds}"]


def p_value(p: float) -> str:
    """Return a p-value for a table."""
    return NONE if p != p else "< 0.0001" if p < 0.0001 else f"{p:.4f}"
