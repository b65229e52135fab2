"""Scores of continual runs as tables."""

from collections.abc import Mapping
from typing import Any

from hft_trl.continual.rounds import WITHOUT_TRANSFER
from hft_trl.report.tables import NONE, Grid

Scores = dict[str, Any]
"""What `scores.json` holds."""


def run_name(scores: Scores) -> str:
    """Approach and method of a run, such as `sequential, HFT`; an approach with adapters has no method."""
    return scores["approach"] + (f", {scores['method'].upper()}" if scores["method"] else "")


def transfer(scores: Scores, number: int = -1) -> str:
    """Backward transfer after a round, as a table shows it."""
    return NONE if scores["approach"] in WITHOUT_TRANSFER else f"{scores['bwt'][number]:+.1f}"


def score_grid(scores: Scores) -> Grid:
    """The matrix with OP and BWT: a row per round, a column per task."""
    rows = []
    rounds = zip(scores["rounds"], scores["matrix"], scores["op"], strict=True)
    for number, (planned, row, op) in enumerate(rounds):
        cells = [f"{score:.1f}" for score in row]
        empty = [NONE] * (len(scores["tasks"]) - len(row))
        rows.append([planned["name"], *cells, *empty, f"{op:.1f}", transfer(scores, number)])
    return Grid(f"{run_name(scores)}: scores from 0 to 100", ["after", *scores["tasks"], "OP", "BWT"], rows)


def forgetting_grid(scores: Scores) -> Grid:
    """For each task the score after its own round, at the end, and what came between."""
    rows, last = [], scores["matrix"][-1]
    for number, (name, metric) in enumerate(zip(scores["tasks"], scores["metrics"], strict=True)):
        if number < len(last):
            own = next(row for row in scores["matrix"] if len(row) > number)[number]
            rows.append([name, metric, f"{own:.1f}", f"{last[number]:.1f}", f"{last[number] - own:+.1f}"])
    return Grid("What is left of each task", ["task", "metric", "after its round", "at the end", "change"], rows)


def comparison_grid(runs: Mapping[str, Scores]) -> Grid:
    """
    Runs side by side in the paper's shape: a row per approach, OP and BWT after the last round by method. If there are
    approaches with adapters, which have no method, their figures stand in columns of their own.

    Args:
        runs (`Mapping[str, Scores]`):
            Scores by name. Runs of one approach and method get a row each.
    """
    rows: list[dict[str | None, Any]] = []
    for name, scores in runs.items():
        open_row = next(
            (row for row in rows if row["approach"] == scores["approach"] and scores["method"] not in row), None
        )
        if open_row is None:
            open_row = {"approach": scores["approach"], "runs": []}
            rows.append(open_row)
        open_row[scores["method"]] = f"{scores['op'][-1]:.1f}", transfer(scores)
        open_row["runs"].append(name)
    empty = (NONE, NONE)
    columns = {"fft": "FFT", "hft": "HFT"}
    if any(None in row for row in rows):
        columns[None] = "LoRA"
    head = [f"{figure} {name}" for name in columns.values() for figure in ("OP", "BWT")]
    cells = [
        [row["approach"], *(cell for method in columns for cell in row.get(method, empty)), ", ".join(row["runs"])]
        for row in rows
    ]
    return Grid("After the last round", ["approach", *head, "runs"], cells)


def other_settings(runs: Mapping[str, Scores]) -> list[str]:
    """What the settings of runs differ in beside approach and method, a line for each, so that nobody takes it for theirs."""
    lines = []
    for key in dict.fromkeys(key for scores in runs.values() for key in scores["settings"]):
        found = {name: scores["settings"][key] for name, scores in runs.items() if key in scores["settings"]}
        if len(set(map(str, found.values()))) > 1:
            lines.append(f"{key}: " + ", ".join(f"{value} ({name})" for name, value in found.items()))
    return lines
