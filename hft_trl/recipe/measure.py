"""Measure memory, losses and speed of a stage, and how far every unit moved."""

import contextlib
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.utils import logging

from hft_trl import reference
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.errors import HFTError, first_line
from hft_trl.frozen.quantized_linear import packed_away
from hft_trl.report import StageRecord, UnitChange
from hft_trl.saved_models.diff import relative_change
from hft_trl.saved_models.saved_model import SavedModel
from hft_trl.selection import Selection, find_units
from hft_trl.trainers.mixin import HFTMixin
from hft_trl.weights import named_parameters, numel

if TYPE_CHECKING:
    from hft_trl.recipe import Stage

logger = logging.get_logger(__name__)


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory, if the platform supports it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # some containers do not allow it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak memory in bytes: of the GPU since the last reset, or the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux" and (peak := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())):
        return int(peak[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def parameter_counts(trainer: ResumableMixin) -> tuple[int, int]:
    """Return how many parameters of a trainer's model learn, and how many there are."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    sizes = [(numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    if isinstance(trainer, HFTMixin):
        masked = trainer.hft_selection.masked
        trained += sum(masked.values()) - sum(numel(p) for name, p in named_parameters(model) if name in masked)
    return trained, sum(size for size, _ in sizes) + packed_away(model)


def measure(stage: "Stage", trainer: ResumableMixin, resumed_from: TrainerState | None) -> StageRecord:
    """Return the record of a trained stage. Time and speed are of the part after `resumed_from`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    log = trainer.state.log_history
    losses = [row["loss"] for row in log if "loss" in row]
    runtime = next((row["train_runtime"] for row in reversed(log) if "train_loss" in row), None)
    before = resumed_from or TrainerState(global_step=-1)
    best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    if before.global_step == trainer.state.global_step:
        runtime = None  # the checkpoint was of the last step, so nothing was trained
    tokens = int(trainer.state.num_input_tokens_seen)
    states = trainer.optimizer.state.values() if trainer.optimizer else ()
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    optimizer_bytes = sum(tensor.nbytes for tensor in tensors)
    beside = shared = None
    if vars(trainer).get("ref_model") is not None:
        beside, shared = reference.memory(model, trainer.accelerator.unwrap_model(trainer.ref_model))
    if trainer.is_deepspeed_enabled:  # each process holds a part, as flat tensors
        optimizer_bytes = sum(gather_object([optimizer_bytes]))
    trained, total = parameter_counts(trainer)
    method = stage.hft.method if stage.hft is not None else None
    selection = trainer.hft_selection if isinstance(trainer, HFTMixin) else None
    return StageRecord(
        name=stage.name,
        method=method,
        selection_digest=selection.digest if selection is not None else None,
        share=selection.share if selection is not None else {"model": trained / total},
        trainable_params=trained,
        total_params=total,
        steps=trainer.state.global_step,
        tokens=tokens,
        tokens_per_second=(tokens - int(before.num_input_tokens_seen)) / runtime if runtime else None,
        runtime_seconds=runtime,
        peak_memory_bytes=peak_memory(),
        optimizer_state_bytes=optimizer_bytes or None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        frozen_unchanged=True if method == "hft" else None,  # `train` raises where it is not
        start_model=stage.model.model_name_or_path,
        dataset=stage.source,
        batch_size=trainer.get_total_train_batch_size(trainer.args),
        learning_rate=trainer.args.learning_rate,
        resumed_from_step=resumed_from.global_step if resumed_from else None,
        best_step=trainer.state.best_global_step if best else None,
        history=log,
        reference_memory_bytes=beside,
        shared_reference_bytes=shared,
    )


def movements(stage: "Stage", selection: Selection) -> list[UnitChange]:
    """Return how far each unit moved from its stage's start model and the run's. Processes share the work."""
    model, state = stage.model, PartialState()
    start, base = model.address, (stage.base or model).address
    trainable, found, problem = set(selection.trainable), [], None
    try:
        structure = model.structure()
        units = find_units(structure, selection.config.exclude)
        after = SavedModel(str(stage.folder), structure)
        before = {name: SavedModel(name, structure) for name in {base, start}}
        # Distributed by size, so that all processes read about the same amount
        largest_first = sorted(enumerate(units), key=lambda pair: -pair[1].size)
        for number, unit in largest_first[state.process_index :: state.num_processes]:
            learns = unit.names[0] in trainable
            # The frozen half has the start model's bits, which was checked when it was saved
            known = {
                name: relative_change(saved, after, unit.names) if learns or name != start else 0.0
                for name, saved in before.items()
            }
            place = (unit.names[0], unit.layer, unit.category, unit.slot)
            found.append((number, UnitChange(*place, learns, known[base], known[start])))
    except (HFTError, OSError, SafetensorError) as error:
        problem = first_line(error)
    found, problems = gather_object(found), list(filter(None, gather_object([problem])))
    if problems:
        logger.warning(f"Movements are left out of the report: {problems[0]}")
        return []
    return [moved for _, moved in sorted(found, key=lambda pair: pair[0])]
