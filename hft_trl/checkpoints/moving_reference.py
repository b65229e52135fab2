"""Checkpoints of a reference model that follows the policy (`sync_ref_model`)."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from trl import BEMACallback

from hft_trl.backends.fsdp import sharded_by
from hft_trl.errors import HFTError
from hft_trl.weights import named_parameters

REFERENCE_FILE = "reference.safetensors"


def check(args: TrainingArguments) -> None:
    """Reject a moving reference if it is sharded, because no checkpoint can hold it then."""
    if not vars(args).get("sync_ref_model") or args.save_strategy == "no":
        return
    sharded = sharded_by(args)
    if sharded:
        raise HFTError(
            f"sync_ref_model is true, which moves the reference, and under {sharded} no checkpoint holds it, so a run "
            "that was stopped could not resume: set save_strategy to 'no', or train in one process or with DDP."
        )


def save(trainer: Trainer, checkpoint: Path) -> None:
    """Save a moving reference to a checkpoint, if one process holds all of it."""
    reference = _reference(trainer)
    if reference is None or not trainer.args.should_save or sharded_by(trainer.args):
        return
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in named_parameters(reference)}
    save_file(tensors, checkpoint / REFERENCE_FILE, metadata={"format": "pt"})


def load(trainer: Trainer, checkpoint: str | Path) -> None:
    """Load a moving reference from a checkpoint, which has to hold it. All processes have to call it."""
    if any(isinstance(callback, BEMACallback) for callback in trainer.callback_handler.callbacks):
        raise HFTError(
            f"BEMACallback averages weights over all of training, and {checkpoint} does not hold the average, so it "
            "would start again: train without resume_from_checkpoint, or without BEMACallback."
        )
    reference, file = _reference(trainer), Path(checkpoint) / REFERENCE_FILE
    if reference is None:
        return
    if not file.is_file():
        raise HFTError(
            f"sync_ref_model is true, which moves the reference, but {checkpoint} has no {REFERENCE_FILE}, so it "
            "would start again as the start model: train into another output_dir, or set sync_ref_model to false."
        )
    tensors = load_file(file)
    with torch.no_grad():
        for name, parameter in named_parameters(reference):
            parameter.copy_(tensors[name])


def _reference(trainer: Trainer) -> torch.nn.Module | None:
    """Return the unwrapped reference if it moves, else `None`."""
    own = vars(trainer).get("ref_model") if vars(trainer.args).get("sync_ref_model") else None
    return trainer.accelerator.unwrap_model(own) if own is not None else None
