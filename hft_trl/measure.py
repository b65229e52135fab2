"""What a stage measures: memory, losses, speed, and how far every unit moved."""

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainerState
from transformers.utils import logging

from hft_trl import reference
from hft_trl.errors import HFTError
from hft_trl.quantized_linear import packed_away
from hft_trl.recipe import Stage
from hft_trl.report import StageRecord, UnitChange
from hft_trl.resumable import ResumableMixin
from hft_trl.selection import Selection, find_units
from hft_trl.weights import changes
from hft_trl.zero import numel

logger = logging.get_logger(__name__)


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory, where the platform has a way to."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # not every container lets a process do so
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU since the last reset, without one the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux" and (peak := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())):
        return int(peak[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def measure(stage: Stage, trainer: ResumableMixin, resumed_from: TrainerState | None) -> StageRecord:
    """
    What a trainer that has trained knows of its own run.

    Args:
        stage ([`Stage`]):
            The stage.
        trainer ([`ResumableMixin`]):
            Its trainer, after `train`.
        resumed_from ([`~transformers.TrainerState`], *optional*):
            The state of the checkpoint that training went on from. Time and speed are those of the part after it, all
            else is of the whole stage.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    log = trainer.state.log_history
    losses = [row["loss"] for row in log if "loss" in row]
    runtime = next((row["train_runtime"] for row in reversed(log) if "train_loss" in row), None)
    if resumed_from and resumed_from.global_step == trainer.state.global_step:
        runtime = None  # a checkpoint of the last step is taken over, which is no training
    tokens = int(trainer.state.num_input_tokens_seen)
    earlier_tokens = int(resumed_from.num_input_tokens_seen) if resumed_from else 0
    memory = (
        [value for entry in trainer.optimizer.state.values() for value in entry.values()] if trainer.optimizer else []
    )
    own_reference = vars(trainer).get("ref_model")
    beside, shared = (
        reference.memory(model, trainer.accelerator.unwrap_model(own_reference)) if own_reference else (None, None)
    )
    optimizer_bytes = sum(v.numel() * v.element_size() for v in memory if isinstance(v, torch.Tensor))
    if trainer.is_deepspeed_enabled:  # every process holds a part, of flat tensors that don't know of the whole
        optimizer_bytes = sum(gather_object([optimizer_bytes]))
    sizes = [(numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    total = sum(size for size, _ in sizes) + packed_away(model)
    method, selection = stage.hft.method if stage.hft is not None else None, trainer.hft_selection
    if selection is not None and selection.masks is not None:
        masked = {name: numel(p) for name, p in model.named_parameters() if name in selection.masked}
        trained -= sum(masked.values()) - sum(selection.masked.values())
    return StageRecord(
        name=stage.name,
        method=method,
        selection_digest=selection.digest if selection is not None else None,
        share=selection.share if selection is not None else {"model": trained / total},
        trainable_params=trained,
        total_params=total,
        steps=trainer.state.global_step,
        tokens=tokens,
        tokens_per_second=(tokens - earlier_tokens) / runtime if runtime else None,
        runtime_seconds=runtime,
        peak_memory_bytes=peak_memory(),
        optimizer_state_bytes=optimizer_bytes or None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        frozen_unchanged=True if method == "hft" else None,  # `train` raises where it is not
        start_model=stage.model.model_name_or_path,
        dataset=stage.data.dataset,
        resumed_from_step=resumed_from.global_step if resumed_from else None,
        history=log,
        reference_memory_bytes=beside,
        shared_reference_bytes=shared,
    )


def movements(
    model: PreTrainedModel, selection: Selection, base_model: str, start_model: str, folder: str
) -> list[UnitChange]:
    """
    How far every unit moved, from the saved files.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The trained model, for its units.
        selection ([`Selection`]):
            Which of them learned.
        base_model, start_model, folder (`str`):
            The run's first start model, this stage's start model, and the trained model.

    Returns:
        `list[UnitChange]`: One entry per unit; a figure is `None` where the files name their tensors in another way.
    """
    try:
        from_base = {change.name: change for change in changes(base_model, folder)}
        from_start = {change.name: change for change in changes(start_model, folder)}
    except HFTError as error:
        logger.warning(f"Movements are left out of the report: {error}")
        return []
    trainable = set(selection.trainable)
    moved = []
    for unit in find_units(model, selection.config.exclude):
        distances = []
        for table in (from_base, from_start):
            known = [table[name] for name in unit.names if name in table]
            size = sum(change.base**2 for change in known) ** 0.5
            length = sum(change.difference**2 for change in known) ** 0.5
            distances.append(length / size if size else None)
        learns = unit.names[0] in trainable
        moved.append(UnitChange(unit.names[0], unit.layer, unit.category, unit.slot, learns, *distances))
    return moved
