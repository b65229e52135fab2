"""Checks whether a checkpoint is complete and whether a run may resume from it."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.constants import FSDP_MODEL_NAME
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, logging

from hft_trl.checkpoints.sealing import MANIFEST_FILE, REPLICATED, incomplete_because
from hft_trl.errors import HFTError, first_line
from hft_trl.processes import by_first_process
from hft_trl.weights import check_readable, weight_files

logger = logging.get_logger(__name__)


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
    if reason := incomplete_because(checkpoint):
        return reason
    needed = {TRAINER_STATE_NAME: ()}
    if not holds_only_model(checkpoint):
        # FSDP whole, FSDP sharded, DeepSpeed
        needed |= {OPTIMIZER_NAME: ("optimizer.bin", "optimizer_0", "latest"), SCHEDULER_NAME: ("latest",)}
    for name, others in needed.items():
        if not any((checkpoint / candidate).exists() for candidate in (name, *others)):
            return f"{name} is missing"
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({first_line(error)})"
    shards, adapter = checkpoint / f"{FSDP_MODEL_NAME}_0", checkpoint / ADAPTER_SAFE_WEIGHTS_NAME
    listed = (checkpoint / MANIFEST_FILE).exists() or shards.is_dir() or adapter.is_file()
    try:
        check_readable(checkpoint.glob("*.safetensors") if listed else weight_files(str(checkpoint)).values())
    except (ValueError, OSError) as error:
        return str(error)
    return None


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """
    Return the newest complete checkpoint, or `None`. All processes have to call it.

    A warning names incomplete checkpoints. They are not removed.
    """
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
        raise HFTError(f"{checkpoint} is torn ({reason}): resume from another checkpoint.")
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
    """
    Name the checkpoint in errors from loading it until the end of the first step.

    A damaged file can have the right size. Libraries notice the damage when they read it or first use its content.
    """
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
