"""What a run is to do, written down before it begins: it keeps a folder to one approach and one list of tasks."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hft_trl.errors import HFTError
from hft_trl.files import read_object, write_json_once, writing
from hft_trl.processes import by_first_process
from hft_trl.recipe import Stage
from hft_trl.recipe.folder import STAGE_FILE

PLAN_FILE = "plan.json"
RESULTS = ("scores.json", "report.md", "matrix.png", "curves.png")

Plan = Mapping[str, Any]
"""`approach`, `method` (`None` for adapters), `model`, `tasks`, `metrics`, and `settings`, on which scores depend."""


def rows_file(output: Path, name: str, rows: list[dict[str, str]], kind: str = "") -> Path:
    """
    Where the rows of a round are written. What they are is part of the name: a run that is refused because of other
    settings has then not changed the rows of the earlier one.

    Args:
        output (`Path`):
            Folder of the run.
        name (`str`):
            Name of the round.
        rows (`list[dict[str, str]]`):
            The rows.
        kind (`str`, *optional*, defaults to `""`):
            What tells these rows of the round from others.
    """
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]
    return output / f"{name}{kind}-{digest}.json"


def check_plan(folder: str | Path, plan: Plan) -> None:
    """
    Check that a folder is that of a run with the same approach and tasks; tasks may have been added at the end.

    What else may differ is compared round by round.

    Args:
        folder (`str` or `Path`):
            Folder of the run.
        plan (`Plan`):
            What the run is to do now.

    Raises:
        [`HFTError`]: If it is that of another run, or its plan can't be read.
    """
    path = Path(folder) / PLAN_FILE
    try:
        content = read_object(path, approach=str, tasks=list)
        before = {"approach": content["approach"], "tasks": [str(task) for task in content["tasks"]]}
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise HFTError(f"{path} can't be read ({error}): pass --overwrite, or choose another output_dir.") from error
    same = {"approach": plan["approach"], "tasks": plan["tasks"][: len(before["tasks"])]}
    for key, now in same.items():
        if before[key] != now:
            there, here = (
                ", ".join([value] if isinstance(value, str) else value) for value in (before[key], plan[key])
            )
            raise HFTError(
                f"output_dir {str(folder)!r} was made with the {key} {there}, now it is {here}: choose another output_dir, or "
                "pass --overwrite."
            )


def write_plan(folder: str | Path, plan: Plan, stages: Iterable[Stage], overwrite: bool = False) -> None:
    """
    Write down what a run is to do, when its rounds' folders are locked. Every process has to call.

    Args:
        folder (`str` or `Path`):
            Folder of the run.
        plan (`Plan`):
            What the run is to do.
        stages (`Iterable[Stage]`):
            Its rounds.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to remove what an earlier run left: its results, and rounds that this one has not.
    """
    folder, stages = Path(folder), list(stages)

    def write() -> None:
        with writing(folder):
            if overwrite:
                _clear(folder, stages)
            write_json_once(folder / PLAN_FILE, plan)

    by_first_process(write)


def _clear(folder: Path, stages: list[Stage]) -> None:
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    ours = {stage.folder for stage in stages} | {Path(stage.data.dataset) for stage in stages}
    ours |= {stage.memory for stage in stages if stage.memory is not None}
    for path in folder.glob("round-*"):
        if path in ours:
            continue
        if (path / STAGE_FILE).is_file():
            shutil.rmtree(path)
        elif path.is_file() and path.suffix == ".json":
            path.unlink()
