"""Find the selection of a start model or checkpoint, and check whether training may resume."""

import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file

from hft_trl.errors import HFTError
from hft_trl.selection.selection import SELECTION_FILE, Selection


def remember(model: PreTrainedModel, selection: Selection) -> None:
    """Note the selection that a model object was trained with, so that its next stage draws another one."""
    model._hft_trained_with = selection


def selection_of(model: PreTrainedModel, revision: str | None = None) -> Selection | None:
    """Return the selection that this object was last trained with, else that of its folder or hub revision."""
    if "_hft_trained_with" in vars(model):
        return model._hft_trained_with
    try:
        file = cached_file(
            model.config._name_or_path,
            SELECTION_FILE,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # a folder that is gone by now, or a name that is no hub id
        return None
    return Selection.load(Path(file).parent) if file is not None else None


def check_resumable(selection: Selection, resume_from: str | os.PathLike | bool | None, output_dir: str) -> bool:
    """
    Reject a checkpoint that was trained with another selection or from another start model.

    With another selection the optimizer's states would go to the wrong parameters, without an error where shapes
    agree. `resume_from` is the argument of `train`. Returns whether training resumes at all.
    """
    checkpoint = get_last_checkpoint(output_dir) if resume_from is True and Path(output_dir).is_dir() else resume_from
    if not checkpoint or checkpoint is True:
        return False
    if not Path(checkpoint).is_dir():
        raise HFTError(
            f"resume_from_checkpoint is {str(checkpoint)!r}, which is not a folder: give the folder of a checkpoint."
        )
    if not (Path(checkpoint) / SELECTION_FILE).is_file():
        if selection.config.method == "fft":
            return True
        raise HFTError(
            f"{checkpoint} has no {SELECTION_FILE}: it was not trained with HFT, so HFT cannot resume from it."
        )
    saved = Selection.load(checkpoint)
    if saved.digest != selection.digest:
        here = {**selection.config.selecting(), "effective seed": selection.seed}
        there = {**saved.config.selecting(), "effective seed": saved.seed}
        settings = [
            f"{key} {there.get(key, 'unused')!r} there, {here.get(key, 'unused')!r} here"
            for key in here | there
            if there.get(key) != here.get(key)
        ]
        raise HFTError(
            f"{checkpoint} was trained with selection {saved.digest[:16]}, this run has {selection.digest[:16]} "
            f"({'; '.join(settings) or 'the parameter names or masks differ'}): resume with the checkpoint's "
            "settings, or train into another output_dir."
        )
    start, here = saved.start_model, selection.start_model
    if start and here and start["weights_digest"] != here["weights_digest"]:
        raise HFTError(
            f"{checkpoint} was started from {start['name_or_path']!r} (weights {start['weights_digest'][:16]}), "
            f"this run from {here['name_or_path']!r} (weights {here['weights_digest'][:16]}): start from the same "
            "model, or train into another output_dir."
        )
    return True
