"""Lock the folder of a stage, check it against the stage's settings, and mark it as finished."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from huggingface_hub import whoami

from hft_trl.errors import HFTError, first_line
from hft_trl.files import flush, read_or_reject, resolved, write_json, write_json_once, writing
from hft_trl.processes import all_see, by_first_process
from hft_trl.recipe.parsing import CHECKPOINTING
from hft_trl.redact import redact
from hft_trl.report import StageRecord
from hft_trl.report.record import from_json
from hft_trl.saved_models.digests import content_digest, mixture_parts, named_files, part_files, start_model

if TYPE_CHECKING:
    from hft_trl.recipe import Stage

STAGE_FILE, LOCK_FILE = "stage.json", "_run.lock"

# Arguments that do not affect the trained weights, so a rerun may change them
VOLATILE = re.compile(
    r"(logging|log|save|push|hub|eval|trackio|report|include)_.*|output_dir|run_name|project|disable_tqdm|do_.*"
    r"|resume_from_checkpoint|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)|dataset_num_proc"
    r"|metric_for_best_model|greater_is_better|skip_memory_metrics|enable_jit_checkpoint"
)

# Recorded, but a resumed run may change them too: the division of the global batch only affects how sums are rounded,
# and the others cost memory or time
MAY_DIFFER = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
    *("prediction_loss_only", "ddp_timeout", "torch_empty_cache_steps", "activation_offloading"),
    *(f"{name}{suffix}" for name in CHECKPOINTING for suffix in ("", "_kwargs")),
}
# Digests of the start model, and what has changed if they differ
START = {"model.weights": "other weights", "model.files": "another configuration or tokenizer"}
# Digests of what lies at a path: if they are equal, it was only moved
MOVED = {"model.model_name_or_path": tuple(START), "data.dataset": ("data.content",)}

Settings = dict[str, dict[str, Any]]  # by section

_held: dict[tuple[int, int], int] = {}  # descriptors that hold locks, by the lock file's device and inode


def lock(folder: Path) -> None:
    """Lock a folder, created if missing, against other runs. Locking it twice is no error."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, held in list(_held.items()):
        if os.fstat(held).st_nlink == 0:  # its folder was removed
            os.close(_held.pop(key))
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    file = os.fstat(handle)
    if (file.st_dev, file.st_ino) in _held:
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 100).decode(errors="replace") or "of unknown number"
        os.close(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise HFTError(
            f"output_dir {str(folder)!r} is in use by process {holder}: wait for it, end it, or choose another one."
        ) from error
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
    _held[file.st_dev, file.st_ino] = handle


def _leave_to_parent() -> None:
    """Release the locks in a forked worker, which may outlive its parent."""
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_leave_to_parent)


def settings(stage: "Stage") -> Settings:
    """Collect the settings that trained weights and figures of retention depend on, as plain JSON."""
    args = stage.args.to_dict()
    # `to_dict` hides all names that end with "token"
    args.update({key: value for key, value in vars(stage.args).items() if key in ("eos_token", "pad_token")})
    best = stage.args.load_best_model_at_end  # evaluation then decides which weights are kept
    kept = {
        key: value
        for key, value in sorted(args.items())
        if not VOLATILE.fullmatch(key) or (best and key.startswith(("eval_", "save_s", "metric_", "greater_")))
    }
    rows = stage.args.train_batch_size * stage.args.gradient_accumulation_steps
    kept["global_batch_size"] = rows * stage.args.world_size
    content = {"model": dataclasses.asdict(stage.model), "data": dataclasses.asdict(stage.data), stage.section: kept}
    if stage.hft is not None:
        stored = {name: vars(stage.hft)[name] for name in ("frozen_dtype", "frozen_quantization")}
        content["hft"] = stage.hft.selecting() | stored
        if stage.hft.calibrated == "wanda" and (texts := stage.hft.source_texts) not in (None, "demo"):
            content["hft"]["source_texts_content"] = content_digest(Path(texts))  # it decides the half
    content |= {"retention": stage.retention.digests()} if stage.retention is not None else {}
    for section, values in stage.own_settings().items():
        content[section] = content.get(section, {}) | values
    content["data"].pop("method")  # that of the stage or, without one, of the run is in hft
    if not best:
        content["data"].pop("eval_split")
    if stage.mixture is not None:
        content["data"]["mixture"] = mixture_parts(stage.mixture)
    else:
        content["data"]["content"] = content_digest(Path(stage.data.dataset))
        content["data"]["dataset"] = place(stage.data.dataset, stage.folder)
    for values in (content["model"], kept):
        values |= named_files({key: value for key, value in values.items() if key != "model_name_or_path"})
    content["model"] |= start_model(stage.model.model_name_or_path, stage.model.model_revision)
    content["model"]["model_name_or_path"] = place(stage.model.model_name_or_path, stage.folder)
    return redact(json.loads(json.dumps(content, default=str)))


def place(source: str, folder: Path) -> str:
    """Return a path that does not depend on the working directory or the run's location. Keep hub ids."""
    path = resolved(source)
    if not path.exists():
        return source
    return f"../{path.name}" if path.parent == resolved(folder).parent else str(path)


def open_stages(stages: Iterable["Stage"], overwrite: bool = False) -> None:
    """Lock and check all stages' folders before one is changed. All processes must call it."""
    stages = list(stages)
    by_first_process(partial(_open, stages, overwrite))
    for stage in stages:
        if PartialState().num_processes > 1 and not all_see(stage.folder / STAGE_FILE):
            raise HFTError(
                f"output_dir {str(stage.folder)!r} is not the same folder for every process: put it on a file system "
                "that all machines share."
            )
        if finished(stage) is not None:
            PartialState().print(f"{stage.folder} is finished with these settings: skipped.")


def _check_inputs(stages: list["Stage"], overwrite: bool) -> None:
    """Reject a stage's folder that contains inputs of the run, or lies inside a folder of data."""
    for stage in stages:
        start, files = stage.base or stage.model, vars(stage.retention) if stage.retention is not None else {}
        data = [stage.data.dataset]
        data += [str(path) for part in stage.mixture.datasets for path in part_files(part)] if stage.mixture else []
        read = [*data, start.model_name_or_path, start.chat_template, vars(stage.args).get("chat_template_path")]
        read += [files.get(name) for name in ("texts", "facts", "prompts")]
        read += [stage.hft.source_texts] if stage.hft is not None else []
        # The file of settings may lie beside what was trained with it, but not be deleted
        read += [word.rpartition("=")[2] for word in sys.argv if overwrite and word.endswith((".yaml", ".yml"))]
        for path in (path for path in read if path and os.path.exists(path)):  # noqa: PTH110
            for folder in (other.folder for other in stages):
                if resolved(path).is_relative_to(resolved(folder)):
                    raise HFTError(f"output_dir {str(folder)!r} holds {path!r}, which the run reads: choose another.")
                if path in data and resolved(folder).is_relative_to(resolved(path)):
                    raise HFTError(f"output_dir {str(folder)!r} lies in the data, {path!r}: choose one outside of it.")


def _check_push(stage: "Stage") -> None:
    """Reject a push to the hub that no token allows. A trainer finds it after earlier stages were trained."""
    try:
        token = whoami(cache=True).get("auth", {}).get("accessToken", {}) if stage.args.push_to_hub else {}
        if token.get("role") == "read":
            raise HFTError("its token may only read")
    except Exception as error:  # the hub's library and the one below it have errors of their own
        raise HFTError(
            f"{stage.name}: push_to_hub is true, but no model can be pushed ({first_line(error)}): log in with "
            "a token that may write, or set push_to_hub to false."
        ) from error


def _open(stages: list["Stage"], overwrite: bool) -> None:
    for stage in stages:
        with writing(stage.folder):
            _take(stage.folder)
    _check_inputs(stages, overwrite)
    unfinished: set[Path] = set()
    for stage in stages:
        if overwrite or not (stage.folder / STAGE_FILE).exists() or not _check(stage, unfinished):
            unfinished.add(stage.folder)
            _check_push(stage)
    for stage in stages:
        with writing(stage.folder):
            for path in stage.folder.iterdir() if overwrite else ():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name not in (STAGE_FILE, LOCK_FILE):  # a folder without stage.json is never removed
                    path.unlink()
            if stage.folder in unfinished:
                write_json_once(stage.folder / STAGE_FILE, {"settings": settings(stage), "record": None})


def _take(folder: Path) -> None:
    """Lock a folder, which is created if it does not exist. Reject one with other files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise HFTError(f"output_dir {str(folder)!r} cannot be written ({error}): choose another one.") from error
    names = {path.name for path in folder.iterdir()}
    if STAGE_FILE not in names and names - {f".{STAGE_FILE}", LOCK_FILE}:
        raise HFTError(f"output_dir {str(folder)!r} contains other files: choose another one.")
    lock(folder)


def _check(stage: "Stage", unfinished: Collection[Path]) -> bool:
    """Return whether a stage is finished. Reject a folder of other settings, or of an `unfinished` start."""
    folder, done = stage.folder, finished(stage) is not None
    if not done and not any(folder.glob("checkpoint-*")):
        return False  # nothing was trained, so the settings may differ
    if gone := unfinished & stage.sources():
        raise HFTError(
            f"{str(folder)!r} was trained before, but {str(min(gone))!r}, its start, holds no finished model: remove "
            f"{str(folder)!r} to train it again from the new model, pass --overwrite, or choose another output_dir."
        )
    differences = _differences(stage, _read(folder)["settings"], settings(stage))
    if differences:
        raise HFTError(
            f"output_dir {str(folder)!r} was made with other settings ({'; '.join(differences)}): choose another "
            "output_dir, pass --overwrite, or remove that folder to train only this stage again."
        )
    if done:
        stage.check_saved()
    return done


def _differences(stage: "Stage", before: Settings, now: Settings) -> list[str]:
    """Describe the settings that differ, except those in `MAY_DIFFER`."""
    old, new, found = dict(_flat(before)), dict(_flat(now)), []
    for name in sorted(old.keys() | new.keys()):
        moved = name in MOVED and all(old.get(key) and old[key] == new.get(key) for key in MOVED[name])
        apart = name.startswith("retention.") and None in (old.get(name), new.get(name))  # measured once
        if moved or apart or old.get(name) == new.get(name) or not MAY_DIFFER.isdisjoint(name.split(".")):
            continue
        if name in START:
            start = stage.model.model_name_or_path
            found.append(f"the start model {start!r} has {START[name]} than the one it was trained from")
        elif name.endswith("content") and old.get(name) and new.get(name):
            found.append(f"the files of {name.removesuffix('content')[:-1]} have changed ({name})")
        else:
            found.append(f"{name} {old.get(name)!r} there, {new.get(name)!r} here")
    return found


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted names. A list is one value unless it holds dictionaries."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def mark_started(stage: "Stage") -> None:
    """Record the start model, which may not exist at opening. All processes must call it."""

    def note_start() -> None:
        before, now = _read(stage.folder)["settings"], settings(stage)
        # Only these: the trainer may have changed its arguments
        content = {**before, **{section: now[section] for section in ("model", *stage.own_settings())}}
        write_json_once(stage.folder / STAGE_FILE, {"settings": content, "record": None})

    by_first_process(note_start)


def finished(stage: "Stage") -> StageRecord | None:
    """Return the measurements of a finished stage, or `None` if it is not finished."""
    record = _read(stage.folder)["record"]
    return None if record is None else from_json(StageRecord, record, f"{stage.folder / STAGE_FILE}: record")


def mark_finished(stage: "Stage", record: StageRecord) -> None:
    """Write a stage's measurements once its model is on the disk. A rerun then skips the stage."""
    flush(stage.folder)
    content = {**_read(stage.folder), "record": dataclasses.asdict(record)}
    write_json(stage.folder / STAGE_FILE, content)


def _read(folder: Path) -> dict[str, Any]:
    remedy = "pass --overwrite, or remove the folder"
    content = read_or_reject(folder / STAGE_FILE, remedy, settings=dict, record=dict | NoneType)
    return {"settings": content["settings"], "record": content["record"]}
