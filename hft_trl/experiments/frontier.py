"""Which points of a frontier no other dominates, and what methods keep at an equal task loss."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from hft_trl.errors import HFTError
from hft_trl.experiments.grid import BASE
from hft_trl.experiments.paired_tests import Difference, paired
from hft_trl.files import read_object

Point = dict[str, Any]
"""A measured model, as in the `points` of `frontier.json`."""

HIGHER_IS_BETTER = ("facts", "mean_token_accuracy")


@dataclass(frozen=True)
class Mean:
    """Store the mean of a model over its seeds. `learned` is the task loss, `kept` the chosen figure of retention."""

    name: str
    series: str
    learned: float
    kept: float
    learned_spread: float
    kept_spread: float
    seeds: int


def read_points(files: Iterable[Path]) -> list[Point]:
    """Return the points of the finished trials."""
    points = []
    for path in files:
        try:
            points += read_object(path, points=list)["points"]
        except (OSError, ValueError) as error:
            raise HFTError(f"{path} cannot be read ({error}): remove it, and run the same command again.") from error
    return points


def series(point: Point) -> str:
    """Return the name of the curve that a point is on: its method, its ratio, and what was made from it."""
    made = "" if point["post_hoc"] is None else f", {point['post_hoc'].partition(' ')[0]}"
    return f"{_method(point)}{made}"


def name(point: Point) -> str:
    """Return the name of a model without its seed, such as `fft 3e-05, average 0.5`."""
    rate = "" if point["learning_rate"] is None else f" {point['learning_rate']:g}"
    made = "" if point["post_hoc"] is None else f", {point['post_hoc']}"
    return f"{_method(point)}{rate}{made}"


def _method(point: Point) -> str:
    return point["method"] if point["ratio"] in (None, 0.5) else f"{point['method']} {point['ratio']:g}"


def means(points: Sequence[Point], kept: str) -> list[Mean]:
    """Return the means of the models over their seeds, in the order of the points."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(name(point), []).append(point)
    found = []
    for key, group in groups.items():
        learned, held = [p["learned"]["loss"] for p in group], [p["kept"][kept] for p in group]
        spread = (stdev(learned), stdev(held)) if len(group) > 1 else (0.0, 0.0)
        found.append(Mean(key, series(group[0]), fmean(learned), fmean(held), *spread, len(group)))
    return found


def front(models: Sequence[Mean], kept: str) -> list[str]:
    """Return the names of the models that no other dominates: none learned and kept at least as much, and one more."""
    sign = -1 if kept in HIGHER_IS_BETTER else 1
    places = [(model.learned, sign * model.kept) for model in models]
    return [
        model.name
        for model, place in zip(models, places, strict=True)
        if not any(other != place and other[0] <= place[0] and other[1] <= place[1] for other in places)
    ]


def compare_at_equal_loss(points: Sequence[Point], ours: str, theirs: str, kept: str) -> Difference | None:
    """
    Compare what two series keep at an equal task loss, seed by seed.

    In each seed, the best that a series keeps at a task loss is interpolated between its own points. The difference
    (ours minus theirs, in the unit of `kept`) is the mean over the losses that both reach. `None` if they have no
    such loss in common in at least two seeds.
    """
    differences = []
    for seed in sorted({point["seed"] for point in points if point["method"] != BASE}):
        curves = [_curve([p for p in points if p["seed"] == seed and series(p) == s], kept) for s in (ours, theirs)]
        if min(len(losses) for losses, _ in curves) < 2:
            continue
        low, high = max(losses.min() for losses, _ in curves), min(losses.max() for losses, _ in curves)
        if low >= high:
            continue
        losses = np.linspace(low, high, 101)
        ours_kept, theirs_kept = (np.interp(losses, *curve) for curve in curves)
        differences.append(float((ours_kept - theirs_kept).mean()))
    return paired(differences, better=1 if kept in HIGHER_IS_BETTER else -1) if len(differences) > 1 else None


def _curve(points: Sequence[Point], kept: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a series that no other of it dominates, by rising task loss."""
    sign = -1 if kept in HIGHER_IS_BETTER else 1
    placed = sorted((point["learned"]["loss"], sign * point["kept"][kept]) for point in points)
    best = list(_improving(placed))
    return np.array([loss for loss, _ in best]), np.array([sign * value for _, value in best])


def _improving(placed: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    least = float("inf")
    for loss, value in placed:
        if value < least:
            least = value
            yield loss, value
