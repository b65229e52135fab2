"""The folder of a stage: whether it may be written, which settings made it, and whether its stage is finished."""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hft_trl.data import content_digest
from hft_trl.errors import HFTError
from hft_trl.recipe import Stage
from hft_trl.report import StageRecord, UnitChange
from hft_trl.weights import check_readable, weight_files

STAGE_FILE = "stage.json"

# Arguments that leave the trained weights as they are, so a rerun may change them.
VOLATILE = re.compile(
    r"(logging|log|save|push|hub|eval|trackio|report|include)_.*|output_dir|run_name|project|disable_tqdm|do_.*"
    r"|resume_from_checkpoint|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)|dataset_num_proc"
    r"|metric_for_best_model|greater_is_better|skip_memory_metrics|enable_jit_checkpoint"
)


def settings(stage: Stage) -> dict[str, Any]:
    """What the trained weights depend on, as plain JSON."""
    args = stage.args.to_dict()
    # `to_dict` hides whatever is called a token, to keep the hub's secret.
    args.update({key: value for key, value in vars(stage.args).items() if key in ("eos_token", "pad_token")})
    best = stage.args.load_best_model_at_end  # then what is evaluated, and when, decides which weights are kept
    kept = {
        key: value
        for key, value in sorted(args.items())
        if not VOLATILE.fullmatch(key) or (best and key.startswith(("eval_", "save_s", "metric_", "greater_")))
    }
    content = {
        "model": dataclasses.asdict(stage.model),
        "data": dataclasses.asdict(stage.data),
        "hft": {**stage.hft.selecting(), "frozen_dtype": stage.hft.frozen_dtype},
        stage.name: kept,
    }
    if not best:
        content["data"].pop("eval_split")
    content["data"]["content"] = content_digest(Path(stage.data.dataset))
    content["model"]["model_name_or_path"] = _place(stage.model.model_name_or_path, stage.folder)
    content["data"]["dataset"] = _place(stage.data.dataset, stage.folder)
    return json.loads(json.dumps(content, default=str))


def _place(source: str, folder: Path) -> str:
    """A path that stays the same when the run is called from elsewhere, or moved as a whole; hub ids as they are."""
    path = Path(source).resolve()
    if path.parent == folder.resolve().parent:
        return f"../{path.name}"
    return str(path) if path.exists() else source


def open_stages(stages: Iterable[Stage], overwrite: bool = False) -> None:
    """
    Check that every stage's folder can be written and belongs to the same settings, before anything is trained.

    Args:
        stages (`Iterable[Stage]`):
            All stages of the run.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to remove what earlier runs left in the stages' folders. Only folders that hold a `stage.json` are
            ever removed.

    Raises:
        [`HFTError`]: If a folder can't be written, holds other things, or was made with other settings.
    """
    gap = None
    for stage in stages:
        problem: list[str | None] = [None]
        if PartialState().is_main_process:
            try:
                _open(stage, overwrite)
            except HFTError as error:
                problem = [str(error)]
        broadcast_object_list(problem)  # so that all processes end, and none waits for the first
        if problem[0] is not None:
            raise HFTError(problem[0])
        if finished(stage) is None:
            gap = stage
        elif gap is not None:
            raise HFTError(
                f"{str(stage.folder)!r} was trained from a model in {str(gap.folder)!r} that is not there any more: pass "
                "--overwrite, or choose another output_dir."
            )
        else:
            check_readable(weight_files(str(stage.folder)).values())
            PartialState().print(f"{stage.folder} is finished with these settings: skipped.")


def _open(stage: Stage, overwrite: bool) -> None:
    folder, now = stage.folder, settings(stage)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise HFTError(
            f"output_dir {str(folder)!r} can't be written ({error.strerror}): choose another one."
        ) from error
    if not (folder / STAGE_FILE).exists():
        if any(path.name != f".{STAGE_FILE}" for path in folder.iterdir()):
            raise HFTError(f"output_dir {str(folder)!r} holds files of something else: choose another one.")
    elif overwrite:
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        before = _read(folder)["settings"]
        differences = [
            f"{section}.{key} {before.get(section, {}).get(key)!r} there, {now.get(section, {}).get(key)!r} here"
            for section in sorted(before.keys() | now.keys())
            for key in sorted(before.get(section, {}).keys() | now.get(section, {}).keys())
            if before.get(section, {}).get(key) != now.get(section, {}).get(key)
        ]
        if differences and not any(folder.glob("checkpoint-*")) and finished(stage) is None:
            _write(folder, {"settings": now, "record": None})  # nothing was trained with the other settings
        elif differences:
            raise HFTError(
                f"output_dir {str(folder)!r} was made with other settings ({'; '.join(differences)}): choose another "
                "output_dir, or pass --overwrite."
            )
        return
    _write(folder, {"settings": now, "record": None})


def finished(stage: Stage) -> StageRecord | None:
    """The figures of a stage that an earlier run finished, `None` if there is something left to train."""
    record = _read(stage.folder)["record"]
    if record is None:
        return None
    moved = [UnitChange(**unit) for unit in record.pop("moved")]
    return StageRecord(**record, moved=moved)


def mark_finished(stage: Stage, record: StageRecord) -> None:
    """Write a stage's figures into its folder, after which a rerun skips the stage."""
    _write(stage.folder, {**_read(stage.folder), "record": dataclasses.asdict(record)})


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
        return {"settings": content["settings"], "record": content["record"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HFTError(
            f"{folder / STAGE_FILE} can't be read ({error!r}): pass --overwrite, or remove the folder."
        ) from error


def _write(folder: Path, content: dict[str, Any]) -> None:
    temporary = folder / f".{STAGE_FILE}"
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    temporary.replace(folder / STAGE_FILE)
