"""From scores of tasks after rounds to what continual learning is judged by: overall performance and backward transfer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hft_trl.continual.answers import Answered
from hft_trl.continual.plan import Plan
from hft_trl.continual.rounds import Round
from hft_trl.errors import HFTError
from hft_trl.files import read_object, write_json, writing
from hft_trl.report import StageRecord

SCORES_FILE = "scores.json"
VERSION = 1
FIELDS = {
    **dict.fromkeys(("approach", "model"), str),
    **dict.fromkeys(("tasks", "metrics", "matrix", "op", "bwt", "rounds"), list),
    **dict.fromkeys(("settings", "probes"), dict),
    "method": str | None,
}

Matrix = Sequence[Sequence[float]]
"""`matrix[t][i]` is the score, from 0 to 100, on task `i` after round `t`; a row is as long as tasks are seen by then."""


@dataclass(frozen=True)
class Curves:
    """
    Overall performance and backward transfer after each round (paper, section 4.3), with t tasks seen by then.

    Attributes:
        op (`list[float]`):
            OP_t, the mean of the scores on the t tasks.
        bwt (`list[float]`):
            BWT_t, 1/t times the sum over the tasks of earlier rounds of their score now less that of their own round.
        bwt_t_minus_1 (`list[float | None]`):
            The same sum divided by the t - 1 earlier tasks, as most of the literature has it; `None` where there are none.
    """

    op: list[float]
    bwt: list[float]
    bwt_t_minus_1: list[float | None]


def curves(matrix: Matrix) -> Curves:
    """
    Overall performance and backward transfer.

    Args:
        matrix (`Matrix`):
            A row per round. A first round of several tasks (all pooled) is a row with all of them.

    Returns:
        [`Curves`]: A value of each per round.
    """
    op, bwt, bwt_t_minus_1 = [], [], []
    first = [next(row for row in matrix if len(row) > task)[task] for task in range(len(matrix[-1]))]
    earlier = 0
    for row in matrix:
        change = sum(row[task] - first[task] for task in range(earlier))
        op.append(sum(row) / len(row))
        bwt.append(change / len(row))
        bwt_t_minus_1.append(change / earlier if earlier else None)
        earlier = len(row)
    return Curves(op, bwt, bwt_t_minus_1)


def score_rows(rounds: Sequence[Round], answered: Sequence[Mapping[int, Answered]]) -> list[list[Answered]]:
    """
    A row per round, with a task for each seen by then, as the newest model that was asked answered it.

    Args:
        rounds (`Sequence[Round]`):
            The rounds so far.
        answered (`Sequence[Mapping[int, Answered]]`):
            For each of them, what its model answered, by the task's number. Where each task has a model of its own, a
            row repeats what the earlier models answered.
    """
    rows: list[list[Answered]] = []
    newest: dict[int, Answered] = {}
    seen: set[int] = set()
    for planned, found in zip(rounds, answered, strict=True):
        newest.update(found)
        seen.update(planned.tasks)
        rows.append([newest[task] for task in sorted(seen)])
    return rows


def write_scores(
    folder: str | Path,
    plan: Plan,
    rounds: Sequence[Round],
    answered: Sequence[Mapping[int, Answered]],
    records: Sequence[StageRecord],
    probes: Mapping[str, Mapping[str, float | None]],
) -> dict[str, Any]:
    """
    Write `scores.json`. The same rounds give the same bytes: it holds no times.

    Args:
        folder (`str` or `Path`):
            Folder of the run.
        plan (`Plan`):
            What the run is to do.
        rounds (`Sequence[Round]`), answered (`Sequence[Mapping[int, Answered]]`):
            The finished rounds, and what their models answered, see [`score_rows`].
        records (`Sequence[StageRecord]`):
            What was measured in them.
        probes (`Mapping[str, Mapping[str, float | None]]`):
            General abilities and knowledge after the last round, by model and name. If there are none, those that an
            earlier call wrote after these rounds are kept.

    Returns:
        `dict[str, Any]`: What was written.
    """
    rows = score_rows(rounds, answered)
    matrix = [[task.score for task in row] for row in rows]
    before = read_scores(folder)
    if not probes and before is not None and len(before["matrix"]) == len(matrix):
        probes = before["probes"]
    content = {
        "version": VERSION,
        **plan,
        "matrix": matrix,
        **asdict(curves(matrix)),
        "probes": probes,
        "rounds": [
            {
                "name": planned.name,
                "tasks": [plan["tasks"][number] for number in planned.tasks],
                "selection_digest": record.selection_digest,
                "share": record.share,
                "steps": record.steps,
                "rows": record.rows,
                "truncated_rows": record.truncated_rows,
            }
            for planned, record in zip(rounds, records, strict=True)
        ],
        "empty_predictions": [[task.empty for task in row] for row in rows],
        "truncated_prompts": [[task.truncated for task in row] for row in rows],
    }
    path = Path(folder) / SCORES_FILE
    with writing(path):
        write_json(path, content, ensure_ascii=False)
    return content


def read_scores(folder: str | Path) -> dict[str, Any] | None:
    """
    What [`write_scores`] wrote; `None` if there is nothing yet.

    Raises:
        [`HFTError`]: If the file is no such file.
    """
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
        raise HFTError(f"{path} can't be read ({error}): remove it, and run the same command again.") from error
    if content["version"] != VERSION:
        raise HFTError(f"{path} holds no scores of version {VERSION}: give the folder of a continual run.")
    return content
