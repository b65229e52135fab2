"""Find the front of a frontier, and compare methods at an equal task loss with paired tests."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from hft_trl.errors import HFTError
from hft_trl.experiments.grid import BASE
from hft_trl.files import read_or_reject

Point = dict[str, Any]
"""A measured model, as in the `points` of `frontier.json`."""

KEPT = {
    "text_loss": "loss on general text (nats per token)",
    "base_kl": "KL from the base on the task's prompts (nats per token)",
    "facts": "facts of the base still known (percent)",
}
AGAINST = "fft"  # what all others are compared with
LEVEL = 0.05  # of the paired tests


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

    def cells(self, decimals: int) -> list[str]:
        """Return mean, interval, p-value and seeds ahead, for a table."""
        mean, low, high = (f"{value:+.{decimals}f}" for value in (self.mean, self.low, self.high))
        interval = "-" if self.low != self.low else f"{low} to {high}"
        p = "-" if self.p != self.p else "< 0.0001" if self.p < 0.0001 else f"{self.p:.4f}"
        return [mean, interval, p, f"{self.ahead} of {self.seeds}"]


@dataclass(frozen=True)
class Mean:
    """Store the means of a model over its seeds: task loss (`learned`) and figure of retention (`kept`)."""

    name: str
    method: str  # with its ratio
    treatment: str  # such as `average`, or empty
    learned: float
    kept: float
    learned_spread: float
    kept_spread: float
    seeds: int

    @property
    def series(self) -> str:
        return _series(self.method, self.treatment)


@dataclass(frozen=True)
class Frontier:
    points: list[Point]
    models: list[Mean]
    front: list[str]
    differences: dict[str, Difference]
    kept: str

    @property
    def recommendation(self) -> str:
        """Say in one sentence which method keeps most at an equal task loss, and how certain that is."""
        sign = _sign(self.kept)
        if not self.differences:
            ahead = dict.fromkeys(m.series for m in self.models if m.name in self.front and m.series != BASE)
            return (
                f"No test was possible: it needs {AGAINST} and another method, two seeds, and a range of the task "
                "loss that both reach (more learning rates widen it)"
                + (f"; in the means over the seeds the front is of {' and '.join(ahead)} alone." if ahead else ".")
            )
        clear = {name: d for name, d in self.differences.items() if d.p < LEVEL}
        better = {name: d for name, d in clear.items() if sign * d.mean < 0}
        if better:
            name, best = min(better.items(), key=lambda pair: sign * pair[1].mean)
            mean, interval, p, ahead = best.cells(4)
            unit = "percentage points of facts" if self.kept == "facts" else "nats per token"
            return (
                f"Take {name}: at an equal task loss it keeps more than {AGAINST} ({mean} {unit}, 95 % interval "
                f"{interval}, p {p}, {ahead} seeds)."
            )
        worse = [name for name, d in clear.items() if sign * d.mean > 0]
        unclear = [name for name in self.differences if name not in worse]
        text = f"Take {AGAINST}: at an equal task loss no method is shown to keep more"
        text += f"; {', '.join(worse)} keep{'s' if len(worse) == 1 else ''} less" if worse else ""
        seeds = " or ".join(sorted({str(self.differences[name].seeds) for name in unclear}))
        text += f"; {', '.join(unclear)} cannot be told from it with {seeds} seeds" if unclear else ""
        return text + f" (paired t-tests, p < {LEVEL})."


def read_frontier(files: Sequence[Path], kept: str) -> Frontier:
    points = []
    for path in (path for path in files if path.exists()):
        points += read_or_reject(path, "remove it, and run the same command again", points=list)["points"]
    models = means(points, kept)
    others = [name for name in dict.fromkeys(map(series, points)) if name not in (BASE, AGAINST)]
    found = {name: compare_at_equal_loss(points, name, AGAINST, kept) for name in others}
    return Frontier(points, models, front(models, kept), {name: d for name, d in found.items() if d is not None}, kept)


def series(point: Point) -> str:
    """Return the name of the curve that a point is on: its method, its ratio, and what was made from it."""
    return _series(_method(point), _treatment(point))


def model_name(point: Point) -> str:
    """Return the name of a model without its seed, such as `fft 3e-05, average 0.5`."""
    rate = "" if point["learning_rate"] is None else f" {point['learning_rate']:g}"
    made = "" if point["post_hoc"] is None else f", {point['post_hoc']}"
    return f"{_method(point)}{rate}{made}"


def _method(point: Point) -> str:
    return point["method"] if point["ratio"] in (None, 0.5) else f"{point['method']} {point['ratio']:g}"


def _series(method: str, treatment: str) -> str:
    return f"{method}, {treatment}" if treatment else method


def _treatment(point: Point) -> str:
    return (point["post_hoc"] or "").partition(" ")[0]


def means(points: Sequence[Point], kept: str) -> list[Mean]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(model_name(point), []).append(point)
    found = []
    for key, group in groups.items():
        learned, held = [p["learned"]["loss"] for p in group], [p["kept"][kept] for p in group]
        spread = (stdev(learned), stdev(held)) if len(group) > 1 else (0.0, 0.0)
        found.append(
            Mean(key, _method(group[0]), _treatment(group[0]), fmean(learned), fmean(held), *spread, len(group))
        )
    return found


def front(models: Sequence[Mean], kept: str) -> list[str]:
    """Return the names of the models that no other model dominates."""
    places = {model.name: (model.learned, _sign(kept) * model.kept) for model in models}
    best = _undominated(places.values())
    return [name for name, place in places.items() if place in best]


def compare_at_equal_loss(points: Sequence[Point], ours: str, theirs: str, kept: str) -> Difference | None:
    """
    Compare what two series keep at an equal task loss, seed by seed.

    In each seed, the best that a series keeps at such a task loss or a lower one is interpolated between its own
    points. The difference (ours minus theirs, in the unit of `kept`) is the mean over the losses that both reach.
    Seeds that lack models are left out. `None` if fewer than two seeds remain.
    """
    differences, counts = [], Counter((series(point), point["seed"]) for point in points)
    complete = {s: max((count for (name, _), count in counts.items() if name == s), default=1) for s in (ours, theirs)}
    for seed in sorted({point["seed"] for point in points if point["method"] != BASE}):
        if any(counts[s, seed] < count for s, count in complete.items()):
            continue
        curves = [_curve([p for p in points if p["seed"] == seed and series(p) == s], kept) for s in complete]
        low, high = max(losses.min() for losses, _ in curves), min(losses.max() for losses, _ in curves)
        if low > high:
            continue
        losses = np.linspace(low, high, 101)
        ours_kept, theirs_kept = (np.interp(losses, *curve) for curve in curves)
        differences.append(float((ours_kept - theirs_kept).mean()))
    return paired(differences, better=-_sign(kept)) if len(differences) > 1 else None


def _curve(points: Sequence[Point], kept: str) -> tuple[np.ndarray, np.ndarray]:
    """Return task losses of a series, rising, and the best that it keeps at each or at a lower one."""
    places = {(point["learned"]["loss"], _sign(kept) * point["kept"][kept]) for point in points}
    best = sorted(_undominated(places))
    # A model that a better one dominates does not end the range in which the better one is compared
    best.append((max(loss for loss, _ in places), best[-1][1]))
    return np.array([loss for loss, _ in best]), np.array([_sign(kept) * value for _, value in best])


def _sign(kept: str) -> int:
    """Return the factor that makes a lower figure the better one."""
    return -1 if kept == "facts" else 1


def _undominated(places: Collection[tuple[float, float]]) -> set[tuple[float, float]]:
    """Return the pairs that no other dominates, if lower is better in both."""
    return {(x, y) for x, y in places if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)}


def check_tests() -> None:
    """Reject a missing scipy before hours of training."""
    if find_spec("scipy") is None:
        raise HFTError("the paired tests need scipy: run pip install -c constraints.txt -e '.[eval]'.")


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
