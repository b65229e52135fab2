"""The manifest of a checkpoint: its files and its layout, written after all other files are on disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from transformers.utils import logging

from hft_trl.errors import HFTError
from hft_trl.files import flush, read_object, sync, write_json, writing

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

MANIFEST_FILE = "hft_checkpoint.json"
MARK_FILE = "_resumable"  # says that a manifest belongs to it; what begins with an underscore is not uploaded
VERSION = 1
REPLICATED = "one process or DDP"


def layout(trainer: "Trainer") -> dict[str, Any]:
    """Return what checkpoints depend on. Only runs with the same `backend` can read each other's checkpoints."""
    state, backend = trainer.accelerator.state, REPLICATED
    if state.distributed_type == DistributedType.FSDP:
        backend = f"FSDP with {state.fsdp_plugin.state_dict_type.name}"
    elif state.distributed_type == DistributedType.DEEPSPEED:
        backend = f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    batch = trainer.get_total_train_batch_size(trainer.args)
    return {"backend": backend, "processes": state.num_processes, "global_batch_size": batch}


@contextmanager
def sealing(trainer: "Trainer", checkpoint: Path) -> Iterator[None]:
    """
    Seal the checkpoint that is saved in this context. All processes have to enter it.

    An old checkpoint of the same name is removed first, or moved away if it is incomplete. The manifest is written
    after all files of all processes, and older checkpoints are rotated after that. Disk errors are [`HFTError`]s and
    leave earlier checkpoints intact.
    """
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
        seal(checkpoint, layout(trainer))
        for other in sort_checkpoints(str(run)):
            set_aside(Path(other))  # so that rotation neither counts nor deletes an incomplete one
        rotate_checkpoints(str(run), limit, trainer.state.best_model_checkpoint, use_mtime=True)


def seal(checkpoint: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint whose other files are complete."""
    flush(checkpoint)
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    write_json(checkpoint / MANIFEST_FILE, {"version": VERSION, **content, "files": files})


def read(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest, or `None`. Unreadable ones raise `ValueError` or `OSError`."""
    try:
        content = read_object(Path(checkpoint) / MANIFEST_FILE, version=int, files=dict, backend=str, processes=int)
    except FileNotFoundError:
        return None
    if content["version"] != VERSION:
        raise ValueError(f"{MANIFEST_FILE} is no manifest of version {VERSION}")
    return content


def incomplete_because(checkpoint: str | Path) -> str | None:
    """
    Return which file is missing or has another size than in the manifest, else `None`.

    Without a manifest (stock TRL), a checkpoint is complete if its last file, `trainer_state.json`, exists.
    """
    checkpoint = Path(checkpoint)
    try:
        manifest = read(checkpoint)
    except (ValueError, OSError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    if manifest is None:
        if (checkpoint / MARK_FILE).exists():
            return f"{MANIFEST_FILE}, which is written last, is missing"
        return None if (checkpoint / TRAINER_STATE_NAME).exists() else f"{TRAINER_STATE_NAME} is missing"
    for name, size in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def set_aside(checkpoint: Path) -> bool:
    """Rename an incomplete `checkpoint-6` to `_torn-checkpoint-6`, which is neither counted nor uploaded."""
    reason = incomplete_because(checkpoint)
    if reason is None:
        return False
    number, target = 1, checkpoint.with_name(f"_torn-{checkpoint.name}")
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"_torn-{checkpoint.name}-{number}")
    logger.warning(
        f"{checkpoint} is torn ({reason}): it is kept as {target.name}, which you may remove, and not used."
    )
    checkpoint.rename(target)
    return True


def check_layout(checkpoint: str | Path, here: dict[str, Any], any_batch: bool = False) -> None:
    """
    Reject a checkpoint that this backend cannot read, or that used another batch size.

    Checkpoints without a manifest are not checked. `any_batch` allows another size, as with `auto_find_batch_size`.
    """
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
