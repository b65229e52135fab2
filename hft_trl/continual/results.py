"""Results of a run in `scores.json`: the scores after each round, overall performance and backward transfer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hft_trl.continual.answers import Answered
from hft_trl.continual.rounds import Round
from hft_trl.continual.run_folder import PLAN_FILE
from hft_trl.errors import HFTError
from hft_trl.files import read_json, read_object, write_json, writing
from hft_trl.recipe.folder import finished

SCORES_FILE = "scores.json"
VERSION = 1
FIELDS = {
    **dict.fromkeys(("approach", "model"), str),
    **dict.fromkeys(("tasks", "metrics", "matrix", "op", "bwt", "rounds"), list),
    **dict.fromkeys(("settings", "probes"), dict),
    "method": str | None,
}
MEASURED = ("selection_digest", "share", "steps", "rows", "truncated_rows")
"""What `scores.json` has of a round's record."""

Scores = dict[str, Any]
"""The content of `scores.json`."""


def curves(matrix: Sequence[Sequence[float]]) -> dict[str, list[float | None]]:
    """
    Compute overall performance and backward transfer after each round (paper, section 4.3), with t tasks seen by then.

    A row of the matrix has the scores on these tasks. OP_t is their mean. BWT_t is 1/t times the sum, over the tasks of
    earlier rounds, of their score now less that after their own round. `bwt_t_minus_1` divides this sum by the t - 1 earlier
    tasks, as most of the literature does.
    """
    found: dict[str, list[float | None]] = {"op": [], "bwt": [], "bwt_t_minus_1": []}
    first = [next(row for row in matrix if len(row) > task)[task] for task in range(len(matrix[-1]))]
    earlier = 0
    for row in matrix:
        change = sum(row[task] - first[task] for task in range(earlier))
        found["op"].append(sum(row) / len(row))
        found["bwt"].append(change / len(row))
        found["bwt_t_minus_1"].append(change / earlier if earlier else None)
        earlier = len(row)
    return found


def score_rows(answered: Sequence[Mapping[str, Answered]]) -> list[list[Answered]]:
    """List for each round the newest result on each task seen by then, from the results of each round's model."""
    rows: list[list[Answered]] = []
    newest: dict[str, Answered] = {}
    for results in answered:
        newest.update(results)
        rows.append(list(newest.values()))
    return rows


def write_scores(
    folder: str | Path,
    rounds: Sequence[Round],
    answered: Sequence[Mapping[str, Answered]],
    probes: Mapping[str, Mapping[str, float | None]],
) -> None:
    """
    Write `scores.json` to a run's folder, which has its plan. It contains no times: the same rounds give the same bytes.

    Args:
        rounds (`Sequence[Round]`):
            The finished rounds.
        answered (`Sequence[Mapping[str, Answered]]`):
            The results of each round's model by task.
        probes (`Mapping[str, Mapping[str, float | None]]`):
            General abilities and knowledge after the last round, by model and name. If there are none, those that an
            earlier call wrote after these rounds are kept.
    """
    folder, rows = Path(folder), score_rows(answered)
    matrix = [[task.score for task in row] for row in rows]
    before = read_scores(folder)
    if not probes and before is not None and len(before["matrix"]) == len(matrix):
        probes = before["probes"]
    records = [vars(finished(planned)) for planned in rounds]
    content = {
        "version": VERSION,
        **read_json(folder / PLAN_FILE),
        "matrix": matrix,
        **curves(matrix),
        "probes": probes,
        "rounds": [
            {
                "name": done.name,
                "tasks": [task.name for task in done.plan.tasks],
                **{key: record[key] for key in MEASURED},
            }
            for done, record in zip(rounds, records, strict=True)
        ],
        "empty_predictions": [[task.empty for task in row] for row in rows],
        "truncated_prompts": [[task.truncated for task in row] for row in rows],
    }
    with writing(folder):
        write_json(folder / SCORES_FILE, content, ensure_ascii=False)


def read_scores(folder: str | Path) -> Scores | None:
    """Read what [`write_scores`] wrote, `None` if there is no such file. Reject a file with another content."""
    path = Path(folder) / SCORES_FILE
    try:
        content = read_object(path, version=int, **FIELDS)
        rows = content["matrix"]
        if not rows or not all(
            isinstance(row, list) and all(isinstance(score, int | float) for score in row) for row in rows
        ):
            raise ValueError("its 'matrix' is no list of rounds' scores")
        if not all(isinstance(name, str) for name in (*content["tasks"], *content["metrics"])):
            raise ValueError("its 'tasks' and 'metrics' are no names")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HFTError(f"{path} cannot be read ({error}): remove it, and run the same command again.") from error
    if content["version"] != VERSION:
        raise HFTError(f"{path} holds no scores of version {VERSION}: give the folder of a continual run.")
    return content
