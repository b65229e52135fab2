"""The folder of a run: its plan, which holds it to one approach and list of tasks, and the rows of its rounds."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hft_trl.continual.rounds import Round
from hft_trl.errors import HFTError
from hft_trl.files import read_object, write_json_once, writing
from hft_trl.processes import by_first_process
from hft_trl.recipe.folder import STAGE_FILE

PLAN_FILE = "plan.json"
RESULTS = ("scores.json", "report.md", "matrix.png", "curves.png")


def rows_file(output: Path, name: str, rows: list[dict[str, str]], kind: str = "") -> Path:
    """
    Name the file of a round's rows, or of another kind of its rows such as `"-memory"`.

    The name contains a digest of the rows: a run that is rejected later has not changed the rows of an earlier run.
    """
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]
    return output / f"{name}{kind}-{digest}.json"


def check_plan(folder: str | Path, plan: Mapping[str, Any]) -> None:
    """
    Check that a folder belongs to a run with the same approach and tasks. Tasks may have been added at the end.

    Other settings are compared round by round when the rounds' folders are opened.
    """
    path = Path(folder) / PLAN_FILE
    try:
        content = read_object(path, approach=str, tasks=list)
        before = {"approach": content["approach"], "tasks": [str(task) for task in content["tasks"]]}
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise HFTError(f"{path} cannot be read ({error}): pass --overwrite, or choose another output_dir.") from error
    comparable = {"approach": plan["approach"], "tasks": plan["tasks"][: len(before["tasks"])]}
    for key, value in before.items():
        if value != comparable[key]:
            old, new = (names if isinstance(names, str) else ", ".join(names) for names in (value, plan[key]))
            raise HFTError(
                f"output_dir {str(folder)!r} was made with the {key} {old}, now it is {new}: choose another output_dir, or "
                "pass --overwrite."
            )


def write_plan(folder: str | Path, plan: Mapping[str, Any], rounds: Sequence[Round], overwrite: bool = False) -> None:
    """
    Write the plan of a run whose rounds' folders are locked. All processes must call it.

    With `overwrite`, the results of an earlier run and those of its rounds that this run does not have are removed.
    """

    def write() -> None:
        with writing(folder):
            if overwrite:
                _clear(Path(folder), rounds)
            write_json_once(Path(folder) / PLAN_FILE, plan)

    by_first_process(write)


def _clear(folder: Path, rounds: Sequence[Round]) -> None:
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    ours = {path for planned in rounds for path in (planned.folder, Path(planned.data.dataset), planned.memory)}
    for path in set(folder.glob("round-*")) - ours:
        if (path / STAGE_FILE).is_file():
            shutil.rmtree(path)
        elif path.is_file() and path.suffix == ".json":
            path.unlink()
