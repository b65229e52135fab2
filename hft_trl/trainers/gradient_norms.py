"""
Gradient norms that a run has measured, kept in its folder:

on a GPU a second measurement may end in another choice.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hft_trl.files import write_json, writing
from hft_trl.selection.importance import Squares
from hft_trl.trainers.calibration import drawn_rows, gradient_squares
from hft_trl.weights import combined_digest, fingerprints, named_parameters

FILE = "_gradient_norms.json"  # what begins with a line is not uploaded


def measured_once(trainer: Trainer, model: PreTrainedModel, names: list[str], samples: int, seed: int) -> Squares:
    """
    Square the gradients of a sample, once for each output folder, weights, rows and settings.

    See [`~hft_trl.trainers.calibration.gradient_squares`].
    So a run that resumes draws the selection that it was started with. Every process has to call.
    """
    folder, key = Path(trainer.args.output_dir), _key(trainer, model, names, samples, seed)
    kept = [_read(folder / FILE, key, names) if PartialState().is_main_process else None]
    broadcast_object_list(kept)
    if kept[0] is not None:
        return kept[0]
    squares = gradient_squares(trainer, model, names, samples, seed)
    if trainer.args.should_save:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FILE, {"of": key, "squares": squares})
    return squares


def _key(trainer: Trainer, model: PreTrainedModel, names: list[str], samples: int, seed: int) -> str:
    """
    Digest (SHA-256, hex) of all that the gradients depend on.

    Of the settings it takes those that the trainer's own config adds.
    """
    others = {field.name for field in dataclasses.fields(TrainingArguments)} - {"bf16", "fp16"}
    added = [field.name for field in dataclasses.fields(trainer.args) if field.name not in others]
    settings = {name: vars(trainer.args)[name] for name in added if not name.startswith("dataset_")}
    weights = combined_digest(fingerprints(named_parameters(model)))
    content = [type(trainer).__name__, weights, names, seed, drawn_rows(trainer, samples, seed), settings]
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()


def _read(file: Path, key: str, names: list[str]) -> Squares | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("of") != key or not isinstance(content.get("squares"), dict):
        return None
    return content["squares"] if content["squares"].keys() == set(names) else None
