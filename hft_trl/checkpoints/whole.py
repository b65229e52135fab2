"""Seal checkpoints with a manifest when all files are on disk, and check them before resuming."""

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from accelerate.utils.constants import FSDP_MODEL_NAME
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, logging

from hft_trl.errors import HFTError, first_line
from hft_trl.files import flush, read_object, sync, write_json, writing
from hft_trl.processes import by_first_process
from hft_trl.weights import check_readable, weight_files

logger = logging.get_logger(__name__)

MANIFEST_FILE = "hft_checkpoint.json"
MARK_FILE = "_resumable"  # says that a manifest belongs to it; what begins with an underscore is not uploaded
VERSION = 1
REPLICATED = "one process or DDP"


def layout(trainer: Trainer) -> dict[str, Any]:
    """Return the backend, processes and global batch size that a checkpoint was saved with."""
    state, backend = trainer.accelerator.state, REPLICATED
    if state.distributed_type == DistributedType.FSDP:
        backend = f"FSDP with {state.fsdp_plugin.state_dict_type.name}"
    elif state.distributed_type == DistributedType.DEEPSPEED:
        backend = f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    batch = trainer.get_total_train_batch_size(trainer.args)
    return {"backend": backend, "processes": state.num_processes, "global_batch_size": batch}


@contextmanager
def sealing(trainer: Trainer, checkpoint: Path) -> Iterator[None]:
    """Seal the checkpoint saved in this context, then rotate older ones. All processes must enter it."""
    args, run = trainer.args, checkpoint.parent
    if args.should_save:
        with writing(checkpoint):
            if checkpoint.exists() and not set_aside(checkpoint):
                shutil.rmtree(checkpoint)
            checkpoint.mkdir(parents=True)
            (checkpoint / MARK_FILE).write_text(f"{MANIFEST_FILE} is written last.\n", encoding="utf-8")
            sync(checkpoint)
    trainer.accelerator.wait_for_everyone()  # no process may write into the folder while it is moved
    limit, args.save_total_limit = args.save_total_limit, None  # transformers rotates before all files exist
    try:
        with writing(checkpoint):
            yield
    finally:
        args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if not args.should_save:
        return
    with writing(checkpoint):
        flush(checkpoint)
        paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
        files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in paths}
        write_json(checkpoint / MANIFEST_FILE, {"version": VERSION, **layout(trainer), "files": files})
        for other in sort_checkpoints(str(run)):
            set_aside(Path(other))  # so that rotation neither counts nor deletes an incomplete one
        rotate_checkpoints(str(run), limit, trainer.state.best_model_checkpoint, use_mtime=True)


@contextmanager
def own_names(model: torch.nn.Module) -> Iterator[None]:
    """
    Save a model in this context under the names that it has in memory.

    transformers saves experts under the names of their hub format, and does not find them when it resumes.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    with patch.object(model, "save_pretrained", partial(model.save_pretrained, save_original_format=False)):
        yield


def read(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest, or `None`. Unreadable ones raise `ValueError` or `OSError`."""
    try:
        content = read_object(Path(checkpoint) / MANIFEST_FILE, version=int, files=dict, backend=str, processes=int)
    except FileNotFoundError:
        return None
    if content["version"] != VERSION:
        raise ValueError(f"{MANIFEST_FILE} is no manifest of version {VERSION}")
    return content


def set_aside(checkpoint: Path) -> bool:
    """Rename an incomplete `checkpoint-6` to `_torn-checkpoint-6`, which is neither counted nor uploaded."""
    reason = torn_because(checkpoint)
    if reason is None:
        return False
    number, target = 1, checkpoint.with_name(f"_torn-{checkpoint.name}")
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"_torn-{checkpoint.name}-{number}")
    logger.warning(
        f"{checkpoint} is incomplete ({reason}): it is renamed to {target.name}, which you may remove, and not used."
    )
    checkpoint.rename(target)
    return True


def check_layout(checkpoint: str | Path, here: dict[str, Any], any_batch: bool = False) -> None:
    """Reject a checkpoint of another backend or (unless `any_batch`) another batch size."""
    there = read(checkpoint)
    if there is None:
        return
    if there["backend"] != here["backend"]:
        raise HFTError(
            f"{checkpoint} was saved by {there['backend']}, whose files {here['backend']} cannot read: resume as it "
            "was launched, or train into another output_dir."
        )
    if there["processes"] != here["processes"]:
        if here["backend"].startswith("DeepSpeed"):
            raise HFTError(
                f"{checkpoint} was saved by {there['processes']} processes, and {here['backend']} cannot divide it "
                f"into {here['processes']}: launch {there['processes']} processes, or train into another output_dir."
            )
        logger.warning(
            f"{checkpoint} was saved by {there['processes']} processes, this run has {here['processes']}: it reads "
            "the same data, but sums are rounded in another way, so it does not end in the same bits."
        )
    if there["global_batch_size"] != here["global_batch_size"] and not any_batch:
        raise HFTError(
            f"{checkpoint} was trained with a global batch of {there['global_batch_size']}, this run has "
            f"{here['global_batch_size']} (per_device_train_batch_size x gradient_accumulation_steps x processes): "
            "change them so that the product is the same, or train into another output_dir."
        )


def holds_only_model(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was saved with `save_only_model`, without any training state."""
    kept = ("optimizer*", f"{SCHEDULER_NAME}*", "rng_state*", "latest")  # DeepSpeed
    return not any(any(Path(checkpoint).glob(pattern)) for pattern in kept)


def torn_because(checkpoint: str | Path) -> str | None:
    """
    Return why a checkpoint cannot be resumed, or `None` if it is complete.

    A checkpoint needs its manifest, which is written last, and all files in full length. One of stock TRL, or from the
    hub, has no manifest. Its state (written last) and weights have to be readable.
    """
    checkpoint = Path(checkpoint)
    try:
        manifest = read(checkpoint)
    except (ValueError, OSError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    if manifest is None and (checkpoint / MARK_FILE).exists():
        return f"{MANIFEST_FILE}, which is written last, is missing"
    needed = {TRAINER_STATE_NAME: ()}
    if not holds_only_model(checkpoint):
        # FSDP whole, FSDP sharded, DeepSpeed
        needed |= {OPTIMIZER_NAME: ("optimizer.bin", "optimizer_0", "latest"), SCHEDULER_NAME: ("latest",)}
    sizes = manifest["files"] if manifest is not None else {}
    for name in (*sizes, *needed):
        if not any((checkpoint / candidate).exists() for candidate in (name, *needed.get(name, ()))):
            return f"{name} is missing"
        if name in sizes and (size := (checkpoint / name).stat().st_size) != sizes[name]:
            return f"{name} has {size} bytes instead of {sizes[name]}"
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({first_line(error)})"
    shards, adapter = checkpoint / f"{FSDP_MODEL_NAME}_0", checkpoint / ADAPTER_SAFE_WEIGHTS_NAME
    listed = manifest is not None or shards.is_dir() or adapter.is_file()
    try:
        check_readable(checkpoint.glob("*.safetensors") if listed else weight_files(str(checkpoint)).values())
    except (ValueError, OSError) as error:
        return str(error)
    return None


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint, or `None`. All processes have to call it."""
    found: list[str | None] = [None]
    if PartialState().is_main_process and Path(folder).is_dir():
        for checkpoint in reversed(sort_checkpoints(str(folder))):
            reason = torn_because(checkpoint)
            if reason is None:
                found = [checkpoint]
                break
            logger.warning(f"Passing over the checkpoint {checkpoint}, which cannot be resumed: {reason}.")
    return broadcast_object_list(found)[0]


def check_whole(checkpoint: str | Path, processes: int, backend: str = REPLICATED) -> None:
    """
    Reject an explicitly named checkpoint that is incomplete.

    A missing part would silently restart from its initial state. `save_only_model` checkpoints give a warning and
    resume with a new optimizer, as in transformers. `backend` is that of a `layout`.
    """
    only_model = holds_only_model(checkpoint)
    reason = torn_because(checkpoint)
    if reason is None and not only_model and not (Path(checkpoint) / MANIFEST_FILE).exists():
        states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
        reason = next((f"{name} is missing" for name in states if not (Path(checkpoint) / name).exists()), None)
    if reason is not None:
        raise HFTError(f"{checkpoint} is incomplete ({reason}): resume from another checkpoint.")
    by_first_process(lambda: _check_sums(Path(checkpoint)))
    if only_model and backend != REPLICATED:
        raise HFTError(
            f"{checkpoint} was saved with save_only_model, and {backend} resumes from files of its own, which it "
            "lacks: train into another output_dir, starting from it as a model if you like."
        )
    if only_model:
        logger.warning(
            f"{checkpoint} was saved with save_only_model: training resumes from its weights and step, with a new "
            "optimizer, learning rate schedule and random states, so it does not end in the same bits as an "
            "uninterrupted run."
        )


def _check_sums(checkpoint: Path) -> None:
    """Verify the checksums in files of `torch.save`, which `torch.load` does not check."""
    for path in sorted(path for path in checkpoint.iterdir() if path.suffix in {".pt", ".pth", ".bin"}):
        if not zipfile.is_zipfile(path):
            continue
        try:
            with zipfile.ZipFile(path) as file:
                wrong = file.testzip()
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            wrong = first_line(error)
        if wrong is not None:
            raise HFTError(
                f"{path} is damaged ({wrong}): remove the folder, so that the checkpoint before it is taken, or "
                "resume from another checkpoint."
            )


@contextmanager
def resuming(trainer: Trainer, checkpoint: str) -> Iterator[None]:
    """Name the checkpoint in errors until the first step ends: its files may be damaged."""
    before, step = trainer.state, TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    try:
        yield
    except (HFTError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch, safetensors, accelerate and DeepSpeed raise many types
        if trainer.state is not before and trainer.state.global_step > step:
            raise
        raise HFTError(
            f"resuming from {checkpoint} failed before its first step was done ({type(error).__name__}: "
            f"{first_line(error)}): if a file of it is damaged, remove the folder, so that the checkpoint before it "
            "is taken, or name another one."
        ) from error
