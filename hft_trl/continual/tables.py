"""Scores of a continual run as a table."""

from typing import Any

from hft_trl.report.tables import Grid

NONE = "-"


def score_grid(scores: dict[str, Any]) -> Grid:
    """
    The matrix with OP and BWT: a row per round, a column per task.

    Args:
        scores (`dict[str, Any]`):
            What `scores.json` holds.
    """
    rows = []
    for planned, row, op, bwt in zip(scores["rounds"], scores["matrix"], scores["op"], scores["bwt"], strict=True):
        cells = [f"{score:.1f}" for score in row]
        empty = [NONE] * (len(scores["tasks"]) - len(row))
        rows.append([planned["name"], *cells, *empty, f"{op:.1f}", f"{bwt:+.1f}"])
    title = f"{scores['approach']}, {scores['method'].upper()}: scores from 0 to 100"
    return Grid(title, ["after", *scores["tasks"], "OP", "BWT"], rows)
