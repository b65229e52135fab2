"""The folder of a stage: whether it may be written, which settings made it, and whether its stage is finished."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from hft_trl.data import content_digest
from hft_trl.errors import HFTError
from hft_trl.files import flush, write_json, writing
from hft_trl.processes import all_see, by_first_process
from hft_trl.recipe import ADAPTER_FOLDER, Adapter, Stage
from hft_trl.report import StageRecord, UnitChange
from hft_trl.sections import CHECKPOINTING
from hft_trl.weights import check_readable, weight_files

STAGE_FILE = "stage.json"

# Arguments that leave the trained weights as they are, so a rerun may change them.
VOLATILE = re.compile(
    r"(logging|log|save|push|hub|eval|trackio|report|include)_.*|output_dir|run_name|project|disable_tqdm|do_.*"
    r"|resume_from_checkpoint|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)|dataset_num_proc"
    r"|metric_for_best_model|greater_is_better|skip_memory_metrics|enable_jit_checkpoint"
)

# How the global batch is divided among processes and steps of accumulation may change too: only sums are rounded anew.
DIVIDING = ("per_device_train_batch_size", "gradient_accumulation_steps")
LOCK_FILE = "_stage.lock"


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
    if stage.auto_checkpointing:  # what it comes to depends on the machine, and the weights do not depend on it
        for name in CHECKPOINTING:
            del kept[name], kept[f"{name}_kwargs"]
        kept[CHECKPOINTING[0]] = "auto"
    kept["global_batch_size"] = (
        stage.args.train_batch_size * stage.args.gradient_accumulation_steps * stage.args.world_size
    )
    content = {
        "model": dataclasses.asdict(stage.model),
        "data": dataclasses.asdict(stage.data),
        stage.section: kept,
    }
    if stage.hft is not None:
        content["hft"] = {**stage.hft.selecting(), "frozen_dtype": stage.hft.frozen_dtype}
        if stage.hft.frozen_quantization:  # only then, so that folders from before it stay valid
            content["hft"]["frozen_quantization"] = stage.hft.frozen_quantization
    if stage.adapter is not None:
        content["lora"] = _adapter(stage.adapter, stage.folder)
    if not best:
        content["data"].pop("eval_split")
    content["data"]["content"] = content_digest(Path(stage.data.dataset))
    if stage.memory is not None:
        content["data"]["memory"] = content_digest(stage.memory)
    content["model"]["model_name_or_path"] = _place(stage.model.model_name_or_path, stage.folder)
    content["data"]["dataset"] = _place(stage.data.dataset, stage.folder)
    return json.loads(json.dumps(content, default=str))


def _adapter(adapter: Adapter, folder: Path) -> dict[str, Any]:
    content = dataclasses.asdict(adapter.lora)
    if not adapter.earlier:
        del content["o_lora_lambda"]  # there is no penalty
    return {
        **content,
        "start": _place(str(adapter.start), folder) if adapter.start is not None else None,
        "earlier": [_place(str(other), folder) for other in adapter.earlier],
    }


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
    unfinished: set[Path] = set()
    for stage in stages:
        by_first_process(partial(_open, stage, overwrite))
        if PartialState().num_processes > 1 and not all_see(stage.folder / STAGE_FILE):
            raise HFTError(
                f"output_dir {str(stage.folder)!r} is not the same folder for every process: put it on a file system that all "
                "machines share."
            )
        if finished(stage) is None:
            unfinished.add(stage.folder)
        elif gone := unfinished & _starts(stage):
            raise HFTError(
                f"{str(stage.folder)!r} was trained from a model in {str(min(gone))!r} that is not there any more: pass "
                "--overwrite, or choose another output_dir."
            )
        else:
            adapter = [] if stage.adapter is None else [stage.folder / ADAPTER_FOLDER / ADAPTER_SAFE_WEIGHTS_NAME]
            check_readable([*weight_files(str(stage.folder)).values(), *adapter])
            PartialState().print(f"{stage.folder} is finished with these settings: skipped.")


def _starts(stage: Stage) -> set[Path]:
    """Folders of the stages that a stage needs."""
    if stage.adapter is None:
        return {Path(stage.model.model_name_or_path)}
    return {Path(stage.model.model_name_or_path), *stage.adapter.earlier, *filter(None, [stage.adapter.start])}


def _open(stage: Stage, overwrite: bool) -> None:
    with writing(stage.folder):
        _open_folder(stage, overwrite)


def _open_folder(stage: Stage, overwrite: bool) -> None:
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
        if any(path.name not in (f".{STAGE_FILE}", LOCK_FILE) for path in folder.iterdir()):
            raise HFTError(f"output_dir {str(folder)!r} holds files of something else: choose another one.")
        _lock(folder)
    elif overwrite:
        _lock(folder)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (
                STAGE_FILE,
                LOCK_FILE,
            ):  # without the first, the rest would seem to be someone else's
                path.unlink()
    else:
        _lock(folder)
        before = _read(folder)["settings"]
        differences = [
            f"{section}.{key} {before.get(section, {}).get(key)!r} there, {now.get(section, {}).get(key)!r} here"
            for section in sorted(before.keys() | now.keys())
            for key in sorted(before.get(section, {}).keys() | now.get(section, {}).keys())
            if before.get(section, {}).get(key) != now.get(section, {}).get(key) and key not in DIVIDING
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


def _lock(folder: Path) -> None:
    """Keep a second run out of a folder until this process ends, however it ends: the kernel lets go of the lock."""
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        # Of the process itself, so that no child which outlives a kill holds it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 100).decode(errors="replace")
        os.close(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise HFTError(
            f"output_dir {str(folder)!r} is in use by process {holder}: wait for it, end it, or choose another one."
        ) from error
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())  # and never closed, which would unlock it


def finished(stage: Stage) -> StageRecord | None:
    """The figures of a stage that an earlier run finished, `None` if there is something left to train."""
    record = _read(stage.folder)["record"]
    if record is None:
        return None
    moved = [UnitChange(**unit) for unit in record.pop("moved")]
    return StageRecord(**record, moved=moved)


def mark_finished(stage: Stage, record: StageRecord) -> None:
    """Write a stage's figures into its folder when its model is on the disk, after which a rerun skips the stage."""
    flush(stage.folder)
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
    write_json(folder / STAGE_FILE, content)
