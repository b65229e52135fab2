"""Read and write the folder of a run: its plan, which fixes approach and tasks, and its scores."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hft_trl.continual.rounds import Answered, Round
from hft_trl.errors import HFTError
from hft_trl.files import read_json, read_object, write_json, write_json_once, writing
from hft_trl.processes import by_first_process
from hft_trl.recipe.folder import STAGE_FILE, finished
from hft_trl.report.record import HISTORY, retention_of

PLAN_FILE = "plan.json"
SCORES_FILE = "scores.json"
ROWS_FILE = re.compile(r"round-\d+(-memory)?-[0-9a-f]{8}\.json")
VERSION = 1
FIELDS = {
    **dict.fromkeys(("approach", "model"), str),
    **dict.fromkeys(("tasks", "metrics", "constant_answer", "matrix", "op", "bwt", "rounds"), list),
    **dict.fromkeys(("settings", "probes"), dict),
    "method": str | None,
}
MEASURED = ("selection_digest", "share", "steps", "rows", "truncated_rows")  # of a round's record

Scores = dict[str, Any]
"""The content of `scores.json`."""


def rows_file(output: Path, name: str, rows: list[dict[str, str]], kind: str = "") -> Path:
    """Return the path of a round's rows, with a digest so that a rejected run overwrites no other rows."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]
    return output / f"{name}{kind}-{digest}.json"


def check_plan(folder: str | Path, plan: Mapping[str, Any]) -> None:
    """Reject a folder of a run with another approach or other tasks. New tasks may follow."""
    path = Path(folder) / PLAN_FILE
    try:
        before = read_object(path, approach=str, tasks=list)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise HFTError(f"{path} cannot be read ({error}): pass --overwrite, or choose another output_dir.") from error
    for key, now in (("approach", plan["approach"]), ("tasks", plan["tasks"][: len(before["tasks"])])):
        if before[key] != now:
            old, new = (run[key] if key == "approach" else ", ".join(map(str, run[key])) for run in (before, plan))
            raise HFTError(
                f"output_dir {str(folder)!r} was made with the {key} {old}, now it is {new}: choose another "
                "output_dir, or pass --overwrite."
            )


def write_plan(folder: str | Path, plan: Mapping[str, Any], rounds: Sequence[Round], overwrite: bool = False) -> None:
    """Write a run's plan, and with `overwrite` remove old results. All processes must call it."""
    folder = Path(folder)
    ours = {path for planned in rounds for path in (planned.folder, Path(planned.data.dataset), planned.memory)}

    def write() -> None:
        results = [folder / name for name in (SCORES_FILE, "report.md", "matrix.png", "curves.png")]
        with writing(folder):
            for path in {*results, *folder.glob("round-*")} - ours if overwrite else ():
                if (path / STAGE_FILE).is_file():
                    shutil.rmtree(path)
                elif path in results or ROWS_FILE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            write_json_once(folder / PLAN_FILE, plan)

    by_first_process(write)


def curves(matrix: Sequence[Sequence[float]]) -> dict[str, list[float | None]]:
    """
    Compute overall performance and backward transfer after each round (paper, section 4.3).

    For t tasks, OP_t is the mean of row t. BWT_t is 1/t times the sum of the changes of earlier tasks' scores since
    their own rounds. `bwt_t_minus_1` divides this sum by t - 1, as most of the literature does.
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
    """List the newest result on each task after each round, from the results of the rounds' models."""
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
    """Write `scores.json`, which contains no times: the same rounds give the same bytes."""
    rows = score_rows(answered)
    matrix = [[task.score for task in row] for row in rows]
    records = [finished(planned) for planned in rounds]
    described = []
    for planned, record in zip(rounds, records, strict=True):
        tasks = [task.name for task in planned.plan.tasks]
        described.append({"name": planned.name, "tasks": tasks, **{key: vars(record)[key] for key in MEASURED}})
    content = {
        "version": VERSION,
        **read_json(Path(folder) / PLAN_FILE),
        "matrix": matrix,
        **curves(matrix),
        "probes": probes,
        "retention": {name: figures for name, figures in retention_of(records).items() if name != HISTORY},
        "rounds": described,
        "empty_predictions": [[task.empty for task in row] for row in rows],
        "truncated_prompts": [[task.truncated for task in row] for row in rows],
    }
    with writing(folder):
        write_json(Path(folder) / SCORES_FILE, content, ensure_ascii=False)


def read_scores(folder: str | Path) -> Scores:
    """Read what [`write_scores`] wrote. Reject a missing or invalid file."""
    path = Path(folder) / SCORES_FILE
    try:
        content = read_object(path, version=int, **FIELDS)
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, not {VERSION}")
    except FileNotFoundError as error:
        raise HFTError(f"{folder} has no {SCORES_FILE}: give the folder of a continual run.") from error
    except (OSError, ValueError) as error:
        raise HFTError(f"{path} cannot be read ({error}): remove it, and run the same command again.") from error
    return content
